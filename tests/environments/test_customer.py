"""The simulated customer: asks for what is missing, and rewards the hidden utility of the whole dialogue."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_ray.data.simulator import utility
from rlhf_ray.environments.customer import Customer
from rlhf_ray.types import Prompt

KNOWN = {"scenario": "refund", "slots": {"order": "17", "product": "lamp"}}
FACTS = "I found order 17 with the lamp."
NEXT = "Our billing team will pay back the lamp this week."
POLITE = "I am sorry for the trouble."


def customer(seed: int = 0, **settings: float) -> Customer:
    made = Customer(**settings)
    made.reset(Prompt("p", np.zeros(1, dtype=np.int32), (), KNOWN), seed)
    return made


def test_a_complete_answer_needs_no_question():
    step = customer().step(f"{FACTS} {NEXT}")
    assert step.done and step.reward == utility(KNOWN, f"{FACTS} {NEXT}").total


@pytest.mark.parametrize(
    ("answer", "about"), [(POLITE, "order"), ("I found order 17 of March.", "lamp"), (FACTS, "next|do now")]
)
def test_the_customer_asks_for_what_is_missing(answer, about):
    import re

    step = customer().step(answer)
    assert not step.done and re.search(about, step.observation)


def test_rewards_add_up_to_the_utility_of_the_dialogue_less_what_asking_costs():
    made = customer(asking_again=0.5)
    answers = [POLITE, FACTS, NEXT]
    steps = [made.step(answer) for answer in answers]
    assert [step.done for step in steps] == [False, False, True]
    assert sum(step.reward for step in steps) == pytest.approx(utility(KNOWN, " ".join(answers)).total - 2 * 0.5)


def test_patience_ends():
    made = customer(patience=1)
    assert not made.step("").done and made.step("").done


def test_a_seed_decides_the_words():
    questions = {customer(seed).step(POLITE).observation for seed in range(20)}
    assert len(questions) == 2 and customer(3).step(POLITE) == customer(3).step(POLITE)


def test_other_prompts_are_refused():
    with pytest.raises(KeyError):
        Customer().reset(Prompt("p", np.zeros(1, dtype=np.int32), (), {}), 0)
