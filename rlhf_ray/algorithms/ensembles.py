"""One reward of several reward models. Pure.

Invariant: members count by their normalised rewards, mean 0 and std 1 over the same samples, or the one with the largest scale
would be the ensemble.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

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
