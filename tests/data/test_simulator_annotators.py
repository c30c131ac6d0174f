"""Simulated annotators: choices follow the stated probabilities, and the accuracy ceiling follows from these."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from rlhf_ray.data.records import Pair
from rlhf_ray.data.simulator import PANEL, Annotator, draw_panel, features, pair_accuracy_ceiling, population_preference

CUSTOMER = {"scenario": "refund", "slots": {"order": "482", "product": "lamp"}}
GOOD = "Thank you for your message. I found order 482 with the lamp. Our billing team will pay back the lamp this week."
BAD = "I found order 483 with the lamp. There is nothing we can do."
FAIR = Annotator("fair", "clerk", "ordinary", temperature=1.0, flattery_bias=0.0, length_bias=0.0, lapse=0.0)


def test_preference_is_bradley_terry_with_lapses():
    good, bad = features(CUSTOMER, GOOD), features(CUSTOMER, BAD)
    assert FAIR.prefers(good, bad) + FAIR.prefers(bad, good) == pytest.approx(1)
    assert FAIR.prefers(good, good) == 0.5
    assert replace(FAIR, lapse=0.2).prefers(good, bad) == pytest.approx(0.1 + 0.8 * FAIR.prefers(good, bad))
    assert replace(FAIR, temperature=1e6).prefers(good, bad) == pytest.approx(0.5, abs=1e-4)


def test_biases_and_tastes_shift_what_is_perceived():
    plain, flattering = features(CUSTOMER, GOOD), features(CUSTOMER, GOOD + " What a clever question!")
    assert replace(FAIR, flattery_bias=2.0).prefers(flattering, plain) > 0.5 > FAIR.prefers(flattering, plain)
    assert replace(FAIR, group="seller").prefers(flattering, plain) > FAIR.prefers(flattering, plain)


def test_the_panel_is_a_function_of_its_seed_and_has_every_group():
    assert draw_panel(0) == PANEL != draw_panel(1)
    assert len({who.group for who in PANEL}) == 4
    assert len({who.id for who in PANEL}) == len(PANEL)


def test_a_ranking_is_a_partition_that_mostly_puts_the_better_first():
    answers = [features(CUSTOMER, text) for text in (BAD, GOOD, GOOD + " Have a nice day.")]
    rng = Random(0)
    rankings = [FAIR.rank(rng, answers) for _ in range(200)]
    assert all(sorted(index for place in places for index in place) == [0, 1, 2] for places in rankings)
    assert sum(places[-1] == [0] for places in rankings) > 180


def test_ratings_are_on_the_scale_and_follow_quality():
    rng = Random(0)
    ratings = {text: [FAIR.rate(rng, features(CUSTOMER, text)) for _ in range(100)] for text in (GOOD, BAD)}
    numbers = [
        rating for rows in ratings.values() for overall, aspects in rows for rating in (overall, *aspects.values())
    ]
    assert set(numbers) <= {1, 2, 3, 4, 5}
    assert sum(overall for overall, _ in ratings[GOOD]) > sum(overall for overall, _ in ratings[BAD]) + 150


def test_the_ceiling_is_the_mean_of_the_likelier_side():
    def pair(chosen: str, rejected: str) -> Pair:
        turns = [({"role": "assistant", "content": text},) for text in (chosen, rejected)]
        return Pair(({"role": "user", "content": "?"},), *turns, metadata=CUSTOMER)

    chance = population_preference(CUSTOMER, GOOD, BAD)
    assert chance > 0.8
    assert pair_accuracy_ceiling([pair(GOOD, BAD)]) == pytest.approx(chance)
    assert pair_accuracy_ceiling([pair(BAD, GOOD)]) == pytest.approx(chance)
    assert pair_accuracy_ceiling([pair(GOOD, BAD), pair(GOOD, GOOD)]) == pytest.approx((chance + 0.5) / 2)
    with pytest.raises(ValueError, match="at least one pair"):
        pair_accuracy_ceiling([])
