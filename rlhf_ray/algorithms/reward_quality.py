"""Quality of a reward model on held-out labels: accuracy, calibration, and how much length alone explains. Pure functions.

Invariants: a comparison is the better response's reward (or length) minus the other's; a value that the data cannot give is None;
a difference of exactly zero counts as half right, so that a constant model has an accuracy of one half.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rlhf_ray.algorithms.statistics import Share, positive_share

BINS = 10
FEWEST = 20
"""Smallest number of comparisons of an annotator or group for which an accuracy is reported."""


@dataclass(frozen=True)
class CalibrationBin:
    """Comparisons of similar confidence."""

    confidence: float
    """Mean of σ(|Δr|), the model's confidence in its order."""
    accuracy: float
    """Share of comparisons whose order was right."""
    count: int


@dataclass(frozen=True)
class RewardQuality:
    """What is reported about a reward model after its training."""

    accuracy: Share
    """Share of comparisons that the model orders as the label does."""
    length_baseline: Share
    """Accuracy of the rule "longer is better", or of its opposite if the training labels support that."""
    longer_is_better: bool
    """Which of the two rules `length_baseline` uses."""
    accuracy_when_longer_is_better: Share | None
    """Accuracy on comparisons whose better response is the longer one."""
    accuracy_when_shorter_is_better: Share | None
    """The same for the shorter one. A model that follows length is good at one and bad at the other."""
    reward_length_correlation: float | None
    """Pearson's correlation over all responses."""
    calibration: tuple[CalibrationBin, ...]
    """Bins of equal size in the order of confidence."""
    expected_calibration_error: float
    """Mean over comparisons of |accuracy − confidence| of their bin (Naeini et al., AAAI 2015)."""
    groups: Mapping[str, Share]
    """Accuracy on the labels of each annotator group with at least `FEWEST` comparisons."""
    annotators: Mapping[str, Share]
    """Accuracy on the labels of each annotator with at least `FEWEST` comparisons."""
    members: int = 1
    """Number of reward models in the ensemble."""
    disagreement: float | None = None
    """Mean over responses of the standard deviation of the ensemble's members, whose rewards have std 1. None: no ensemble."""


def measure_quality(
    rewards: np.ndarray,
    lengths: np.ndarray,
    better: np.ndarray,
    worse: np.ndarray,
    longer_is_better: bool,
    groups: Sequence[str | None],
    annotators: Sequence[str | None],
) -> RewardQuality:
    """Measure a reward model on labelled comparisons.

    Args:
        rewards: float64 [n], not normalised: for Bradley–Terry Δr is the logit of a preference.
        lengths: int64 [n], tokens of each response (a prompt that both sides share may be included).
        better, worse: int64 [c], indices of the two sides of each decided comparison.
        longer_is_better: the rule that the training labels support, see `longer_wins`.
        groups, annotators: the source of each comparison's label; None if unknown.

    Raises:
        ValueError: there are no comparisons.
    """
    if not len(better):
        raise ValueError(
            "the quality of a reward model needs at least one comparison with a better response; there are none"
        )
    gain = rewards[better] - rewards[worse]
    more = lengths[better] - lengths[worse]
    calibration, error = calibrate(gain)
    return RewardQuality(
        accuracy=positive_share(gain),
        length_baseline=positive_share(more if longer_is_better else -more),
        longer_is_better=longer_is_better,
        accuracy_when_longer_is_better=positive_share(gain[more > 0]) if (more > 0).any() else None,
        accuracy_when_shorter_is_better=positive_share(gain[more < 0]) if (more < 0).any() else None,
        reward_length_correlation=_correlation(rewards, lengths),
        calibration=calibration,
        expected_calibration_error=error,
        groups=positive_share_by(gain, groups),
        annotators=positive_share_by(gain, annotators),
    )


def longer_wins(lengths: np.ndarray, better: np.ndarray, worse: np.ndarray) -> bool:
    """Whether the longer response is more often the better one, which is all that a model of length only can learn."""
    return bool(np.sign(lengths[better] - lengths[worse]).sum() >= 0)


def positive_share_by(differences: np.ndarray, names: Sequence[str | None]) -> dict[str, Share]:
    """Share of positive differences for each name with at least `FEWEST` comparisons; `differences` [c], `names` of length c."""
    counts = Counter(name for name in names if name is not None)
    whose = np.asarray(names, dtype=object)
    return {name: positive_share(differences[whose == name]) for name in sorted(counts) if counts[name] >= FEWEST}


def calibrate(gain: np.ndarray) -> tuple[tuple[CalibrationBin, ...], float]:
    """Calibration of the confidence σ(|Δr|) in bins, and the expected calibration error; gain [c] is Δr."""
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
    optimisation. The paper uses the variance; std has the unit of a reward, so λ has none.

    Args:
        rewards: float64 [K, n], normalised rewards of K members.
        how: `mean`, `min` or `uncertainty`.
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
