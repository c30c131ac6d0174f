"""How good a reward model is on labels that it has not seen: accuracy, calibration, and what length alone explains. Pure.

Invariants: a comparison is a difference of two rewards (or lengths), the better response's first; a figure that the data cannot
give is None; a difference of exactly zero counts as half right, so that a constant model has one half.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rlhf_ray.algorithms.statistics import Share, ordered

BINS = 10
FEWEST = 20
"""Comparisons that a person or group must have for a figure of their own."""


@dataclass(frozen=True)
class CalibrationBin:
    """Comparisons of about equal confidence."""

    confidence: float
    """Mean of σ(|Δr|): how sure the model was of its order."""
    accuracy: float
    """How often that order was right."""
    count: int


@dataclass(frozen=True)
class RewardQuality:
    """What is written down of a reward model after its training."""

    accuracy: Share
    """Of comparisons ordered as people did."""
    length_baseline: Share
    """Of the rule "longer is better", or its opposite if that is what the training labels say."""
    longer_is_better: bool
    """Which of the two rules that is."""
    accuracy_when_longer_is_better: Share | None
    """Where the better response is the longer one,"""
    accuracy_when_shorter_is_better: Share | None
    """and where it is the shorter one: a model that follows length is good at one and bad at the other."""
    reward_length_correlation: float | None
    """Pearson's, over all responses."""
    calibration: tuple[CalibrationBin, ...]
    """Bins of equal size, by growing confidence."""
    expected_calibration_error: float
    """Mean over comparisons of |accuracy − confidence| of their bin (Naeini et al., AAAI 2015)."""
    groups: Mapping[str, Share]
    """Accuracy on the labels of each annotator group,"""
    annotators: Mapping[str, Share]
    """and of each annotator; of those with `FEWEST` comparisons or more."""
    members: int = 1
    """Reward models of an ensemble."""
    disagreement: float | None = None
    """Of an ensemble: mean over responses of the members' standard deviation, each member's rewards having std 1."""


def measure_quality(
    rewards: np.ndarray,
    lengths: np.ndarray,
    better: np.ndarray,
    worse: np.ndarray,
    longer_is_better: bool,
    groups: Sequence[str | None],
    annotators: Sequence[str | None],
) -> RewardQuality:
    """The figures of a reward model.

    Args:
        rewards: float64 [n], as the model gives them: for Bradley–Terry Δr is the logit of a preference.
        lengths: int64 [n], tokens of each response (a prompt that both sides share may be included).
        better, worse: int64 [c], indices of the two sides of each decided comparison.
        longer_is_better: which rule the training labels support, see `longer_wins`.
        groups, annotators: whose label each comparison is; None where nobody knows.

    Raises:
        ValueError: there is no comparison.
    """
    if not len(better):
        raise ValueError("quality is measured on comparisons, and there is none that says which response is better")
    gain = rewards[better] - rewards[worse]
    more = lengths[better] - lengths[worse]
    calibration, error = calibrate(gain)
    return RewardQuality(
        accuracy=ordered(gain),
        length_baseline=ordered(more if longer_is_better else -more),
        longer_is_better=longer_is_better,
        accuracy_when_longer_is_better=ordered(gain[more > 0]) if (more > 0).any() else None,
        accuracy_when_shorter_is_better=ordered(gain[more < 0]) if (more < 0).any() else None,
        reward_length_correlation=_correlation(rewards, lengths),
        calibration=calibration,
        expected_calibration_error=error,
        groups=ordered_by(gain, groups),
        annotators=ordered_by(gain, annotators),
    )


def longer_wins(lengths: np.ndarray, better: np.ndarray, worse: np.ndarray) -> bool:
    """Whether the longer response is more often the better one: the only thing that a length-only model can learn."""
    return bool(np.sign(lengths[better] - lengths[worse]).sum() >= 0)


def ordered_by(differences: np.ndarray, names: Sequence[str | None]) -> dict[str, Share]:
    """`ordered` for each name that has comparisons enough to say anything; differences [c], c names."""
    counts = Counter(name for name in names if name is not None)
    whose = np.asarray(names, dtype=object)
    return {name: ordered(differences[whose == name]) for name in sorted(counts) if counts[name] >= FEWEST}


def calibrate(gain: np.ndarray) -> tuple[tuple[CalibrationBin, ...], float]:
    """Bins of |Δr| against how often its order was right, and the expected calibration error; gain [c] is Δr."""
    confidence = 1.0 / (1.0 + np.exp(-np.abs(gain)))
    right = (gain > 0) + 0.5 * (gain == 0)
    parts = np.array_split(np.argsort(confidence, kind="stable"), min(BINS, len(gain)))
    bins = tuple(CalibrationBin(float(confidence[p].mean()), float(right[p].mean()), len(p)) for p in parts)
    error = sum(part.count * abs(part.accuracy - part.confidence) for part in bins) / len(gain)
    return bins, float(error)


def _correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    if len(one) < 2 or one.std() == 0 or other.std() == 0:
        return None
    return float(np.corrcoef(one, other)[0, 1])


Combination = Literal["mean", "min", "uncertainty"]


def combine(rewards: np.ndarray, how: Combination, penalty: float = 0.0) -> np.ndarray:
    """float64 [n]: the reward of each response (Coste et al. 2023, arXiv 2310.02743).

    `mean`: 1/K Σ_k r_k. `min`: min_k r_k, worst-case optimisation. `uncertainty`: mean − λ · std, uncertainty-weighted
    optimisation, there with the variance; std has the unit of a reward, so that λ has none.

    Args:
        rewards: float64 [K, n], of K members, normalised.
        how: one of the three.
        penalty: λ.
    """
    match how:
        case "mean":
            return rewards.mean(axis=0)
        case "min":
            return rewards.min(axis=0)
        case "uncertainty":
            return rewards.mean(axis=0) - penalty * disagreement(rewards)


def disagreement(rewards: np.ndarray) -> np.ndarray:
    """float64 [n]: the members' standard deviation √(1/K Σ_k (r_k − mean)²) on each response; rewards float64 [K, n]."""
    return rewards.std(axis=0)
