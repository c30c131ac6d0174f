"""Quality of a reward model against closed forms and known values."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_ray.algorithms.reward_quality import calibrate, longer_wins, measure_quality, positive_share_by
from rlhf_ray.algorithms.statistics import positive_share


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
