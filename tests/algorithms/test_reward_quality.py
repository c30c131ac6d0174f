"""Quality of a reward model against closed forms and known values; ensembles; win rates and their intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rlhf_ray.algorithms.reward_quality import (
    calibrate,
    combine,
    disagreement,
    longer_wins,
    measure_quality,
    positive_share_by,
)
from rlhf_ray.algorithms.statistics import positive_share, wilson, win_rate


def test_a_model_that_knows_nothing_has_one_half():
    assert positive_share(np.zeros(7)).value == 0.5


def test_a_calibrated_model_has_no_error_and_an_overconfident_one_has_much():
    """Labels are drawn from σ(Δr), as the Bradley–Terry model assumes."""
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 1.5, 40_000)
    agrees = generator.random(40_000) < 1 / (1 + np.exp(-np.abs(logits)))
    gain = np.where(agrees, np.abs(logits), -np.abs(logits))
    bins, error = calibrate(gain)
    assert error < 0.01 and all(abs(b.accuracy - b.confidence) < 0.03 for b in bins)
    assert [b.count for b in bins] == [4000] * 10
    assert calibrate(5 * gain)[1] > 0.15


def test_a_model_that_is_length_is_found_out():
    generator = np.random.default_rng(1)
    lengths = generator.integers(10, 90, 400)
    better, worse = np.arange(0, 400, 2), np.arange(1, 400, 2)
    quality = measure_quality(-0.1 * lengths, lengths, better, worse, False, [None] * 200, [None] * 200)
    assert quality.accuracy == quality.length_baseline
    assert quality.accuracy_when_longer_is_better.value == 0 and quality.accuracy_when_shorter_is_better.value == 1
    assert quality.reward_length_correlation == pytest.approx(-1)
    assert quality.accuracy.value == np.mean(lengths[better] < lengths[worse]) + 0.5 * np.mean(
        lengths[better] == lengths[worse]
    )


def test_annotators_with_enough_labels_have_their_own_accuracy():
    gain = np.asarray([1.0] * 30 + [-1.0] * 10 + [1.0] * 5 + [-1.0] * 25)
    names = ["nurses"] * 40 + [None] * 5 + ["clerks"] * 19 + ["cooks"] * 6
    by_name = positive_share_by(gain, names)
    assert list(by_name) == ["nurses"], "19 and 6 labels say nothing"
    assert (by_name["nurses"].value, by_name["nurses"].count) == (0.75, 40)
    assert positive_share_by(gain, ["all"] * 70)["all"] == positive_share(gain)


def test_what_length_can_learn():
    lengths = np.asarray([5, 3, 9, 1, 2, 4])
    assert longer_wins(lengths, np.asarray([0, 2, 4]), np.asarray([1, 3, 5]))
    assert not longer_wins(lengths, np.asarray([1, 3]), np.asarray([0, 2]))


def test_without_comparisons():
    nothing = np.zeros(0, dtype=np.int64)
    with pytest.raises(ValueError, match="at least one comparison"):
        measure_quality(np.zeros(2), np.ones(2), nothing, nothing, True, [], [])


REWARDS = arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(1, 6)), elements=st.floats(-5, 5))


def test_by_hand():
    rewards = np.asarray([[1.0, 2.0], [3.0, 2.0]])
    assert combine(rewards, "mean").tolist() == [2, 2]
    assert combine(rewards, "min").tolist() == [1, 2]
    assert disagreement(rewards).tolist() == [1, 0]
    assert combine(rewards, "uncertainty", 0.5).tolist() == [1.5, 2]


@given(REWARDS, st.floats(0, 3))
def test_what_is_uncertain_never_counts_more(rewards, penalty):
    mean = combine(rewards, "mean")
    assert (combine(rewards, "min") <= mean + 1e-9).all()
    assert (combine(rewards, "uncertainty", penalty) <= mean + 1e-9).all()
    np.testing.assert_allclose(combine(rewards, "uncertainty", 0.0), mean)


@given(REWARDS, st.floats(-3, 3))
def test_members_that_agree_are_one(rewards, shift):
    same = np.repeat(rewards[:1], 3, axis=0)
    for how in ("mean", "min", "uncertainty"):
        np.testing.assert_allclose(combine(same, how, 2.0), rewards[0], atol=1e-9)
        np.testing.assert_allclose(combine(rewards + shift, how, 1.0), combine(rewards, how, 1.0) + shift, atol=1e-9)


@pytest.mark.parametrize(("how", "wins"), [("mean", "hacked"), ("min", "honest"), ("uncertainty", "honest")])
def test_a_response_that_fools_one_member(how, wins):
    """Four members agree on an honest response; one of them gives a hacked response a high reward."""
    rewards = np.asarray([[1.0, 0.5], [1.1, 0.4], [0.9, 0.6], [1.0, 3.5]])
    honest, hacked = combine(rewards, how, 1.0)
    assert (wins == "honest") == (honest > hacked)


NAN = math.nan


def test_win_rate():
    assert win_rate(np.asarray([1.0, 2.0, 3.0, 4.0]), np.asarray([0.0, 3.0, 3.0, 1.0])).value == (1 + 0 + 0.5 + 1) / 4
    assert win_rate(np.asarray([1.0, NAN, 3.0]), np.asarray([0.0, 1.0, NAN])).value == 1.0, (
        "only the first pair is known"
    )
    assert win_rate(np.asarray([NAN]), np.asarray([1.0])) is None


@pytest.mark.parametrize(
    ("wins", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_of_published_examples(wins, count, low, high):
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3; to four digits."""
    assert (wilson(wins, count).low, wilson(wins, count).high) == pytest.approx((low, high), abs=1e-4)


@given(st.integers(1, 500), st.data())
def test_wilson_interval_holds_the_rate(count, data):
    share = wilson(data.draw(st.integers(0, count)), count)
    rate, low, high = share.value, share.low, share.high
    assert 0 <= low <= rate + 1e-12 and rate - 1e-12 <= high <= 1
    # Its ends are the proportions from which the rate is 1.96 standard errors away.
    for end in (low, high):
        if 1e-9 < end < 1 - 1e-9:
            assert abs(rate - end) / math.sqrt(end * (1 - end) / count) == pytest.approx(1.959964, rel=1e-3)
