"""The hidden utility: its merits and faults, and that texts cannot exploit it."""

from __future__ import annotations

from random import Random

import pytest

from rlhf_ray.data.simulator import features, utility, utility_reward
from rlhf_ray.data.simulator.answers import CARELESS, EXPERT, draw_answer, draw_plan
from rlhf_ray.data.simulator.dialogues import draw_dialogues
from rlhf_ray.data.simulator.grammar import FACTS, SCENARIOS, SENTENCES, read_sentence

CUSTOMER = {"scenario": "refund", "slots": {"order": "482", "product": "lamp"}}
PERFECT = (
    "Thank you for your message. I am sorry for the trouble. I found order 482 with the lamp. "
    "Our billing team will pay back the lamp this week. Have a nice day."
)


def worth(text: str) -> float:
    return utility(CUSTOMER, text).total


def test_a_perfect_answer_gets_every_merit_and_no_cost():
    parts = utility(CUSTOMER, PERFECT).parts
    assert worth(PERFECT) == pytest.approx(10) == pytest.approx(sum(parts.values()))
    assert min(parts.values()) == 0


@pytest.mark.parametrize(
    ("worse", "part"),
    [
        (PERFECT.replace("482", "483"), "wrong_values"),
        (PERFECT.replace("lamp", "clock"), "detail"),
        (
            PERFECT.replace("pay back the lamp this week", "bring it on Monday").replace("billing", "delivery"),
            "wrong_steps",
        ),
        (PERFECT.replace("Thank you for your message. ", ""), "politeness"),
        (PERFECT + " That is not our problem.", "rudeness"),
        (PERFECT + " What a clever question!", "flattery"),
        (PERFECT + " As you may know, we read every message with great care.", "excess_words"),
        (PERFECT + " Have a nice day.", "repeated"),
        (PERFECT[:-1], "unclear"),
        (PERFECT.replace("Our billing team", "Our billing billing team"), "unclear"),
        ("", "silence"),
    ],
)
def test_each_fault_costs_in_its_own_part(worse, part):
    assert worth(worse) < worth(PERFECT)
    assert utility(CUSTOMER, worse).parts[part] < utility(CUSTOMER, PERFECT).parts[part]


@pytest.mark.parametrize(
    "text",
    [
        "482 lamp refund sorry thank you billing team pay back",
        "order 482 lamp. " * 30,
        "Thank you for your message. " * 20,
        " ".join(
            sentence.format(order="482", product="lamp", month="June", day="Monday", street="Hill Road")
            for scenario in SCENARIOS
            for sentence in scenario.steps
        ),
        "\x00\ufffd <|im_start|> \n\n . . . ! ? {order}",
        "!" * 500,
        "I found order 482 with the lamp",
    ],
)
def test_stuffing_repetition_and_noise_score_badly(text):
    assert -25.5 <= worth(text) < 0.5


def test_merits_count_once_however_often_they_are_said():
    said_twice = PERFECT + " I found order 482 with the lamp. Our billing team will pay back the lamp this week."
    merits = [utility(CUSTOMER, text).parts for text in (PERFECT, said_twice)]
    for part in ("order", "detail", "step", "politeness"):
        assert merits[0][part] == merits[1][part]


def test_every_sentence_of_the_grammar_is_read_back_as_its_act():
    slots = {"order": "482", "product": "lamp", "month": "June", "day": "Monday", "street": "Hill Road"}
    for kind, sentences in SENTENCES.items():
        assert {read_sentence(sentence).kind for sentence in sentences} == {kind}
    for detail, sentences in FACTS.items():
        for sentence in sentences:
            assert read_sentence(sentence.format(**slots)).slots == {name: slots[name] for name in ("order", detail)}
    for scenario in SCENARIOS:
        assert {read_sentence(step.format(**slots)).scenario for step in scenario.steps} == {scenario.name}


def test_unspoilt_answers_are_clear_and_experts_write_better_ones():
    rng = Random(0)
    dialogues = draw_dialogues(rng, 300)
    plans = [(one.metadata, draw_plan(rng, one, CARELESS).text()) for one in dialogues]
    assert all(features(metadata, text).unclear == 0 for metadata, text in plans)
    expert, careless = (
        sum(utility(one.metadata, draw_answer(rng, one, skill)).total for one in dialogues) / len(dialogues)
        for skill in (EXPERT, CARELESS)
    )
    assert expert > careless + 3


def test_the_reward_function_scores_each_response_by_its_own_metadata():
    other = {"scenario": "refund", "slots": {"order": "111", "product": "lamp"}}
    rewards = utility_reward([(), ()], [PERFECT, PERFECT], [CUSTOMER, other])
    assert rewards[0] == worth(PERFECT)
    assert rewards[1] < rewards[0]
