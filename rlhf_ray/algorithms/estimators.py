"""The advantage estimators by their names in the config, with what each asks of the rest of the system.

Invariant: they all map token rewards [B, T] to token advantages [B, T], so the driver does not know which one runs. RLOO
and (Dr.) GRPO compare whole responses: their score is the sum of a response's token rewards (a KL penalty in the
reward included), and each of its tokens gets the same advantage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from rlhf_ray.algorithms.advantages import dr_grpo, gae, grpo, rloo
from rlhf_ray.algorithms.reinforce import reinforce_plus_plus, reinforce_plus_plus_baseline


@dataclass(frozen=True)
class EstimatorInput:
    """A global batch, one response in each row."""

    rewards: Tensor
    """[B, T], 0 where masked."""
    mask: Tensor
    """[B, T]."""
    scores: Tensor
    """[B], as they are in the rewards, without a KL penalty."""
    groups: Tensor
    """int64 [B], equal for responses to one prompt."""
    values: Tensor | None = None
    """[B, T] of the critic; None where there is none."""
    gamma: float = 1.0
    lam: float = 0.95


@dataclass(frozen=True)
class Advantages:
    """What the policy and the critic are trained on; 0 where masked."""

    advantages: Tensor
    """[B, T], whitened only where that is part of the estimator's definition."""
    returns: Tensor | None
    """[B, T], targets of the critic; None where there is none."""


@dataclass(frozen=True)
class AdvantageEstimator:
    """One way from rewards to advantages."""

    needs_critic: bool
    needs_groups: bool
    """Every prompt must have at least two responses in the batch."""
    compute: Callable[[EstimatorInput], Advantages]
    per_response: bool = False
    """All tokens of a response have the same advantage."""


def estimator_named(name: str) -> AdvantageEstimator:
    """The estimator of a config's name. Raises ValueError for an unknown one."""
    if name not in ESTIMATORS:
        raise ValueError(f"unknown advantage estimator {name!r}; allowed: {', '.join(sorted(ESTIMATORS))}")
    return ESTIMATORS[name]


def _gae(batch: EstimatorInput) -> Advantages:
    if batch.values is None:
        raise ValueError("the estimator 'gae' needs the values of a critic; configure one, or use 'rloo' or 'grpo'")
    return Advantages(*gae(batch.rewards, batch.values, batch.mask, batch.gamma, batch.lam))


def _grouped(score_advantages: Callable[[Tensor, Tensor], Tensor]) -> Callable[[EstimatorInput], Advantages]:
    def compute(batch: EstimatorInput) -> Advantages:
        valid = batch.mask.bool()
        scores = batch.rewards.masked_fill(~valid, 0.0).sum(dim=1)
        per_response = score_advantages(scores, batch.groups)
        return Advantages(per_response.unsqueeze(1).expand_as(batch.rewards).masked_fill(~valid, 0.0), returns=None)

    return compute


def _reinforce_plus_plus(batch: EstimatorInput) -> Advantages:
    return Advantages(reinforce_plus_plus(batch.rewards, batch.mask, batch.gamma), returns=None)


def _reinforce_plus_plus_baseline(batch: EstimatorInput) -> Advantages:
    advantages = reinforce_plus_plus_baseline(batch.rewards, batch.mask, batch.scores, batch.groups, batch.gamma)
    return Advantages(advantages, returns=None)


def _none(batch: EstimatorInput) -> Advantages:
    return Advantages(batch.rewards.new_zeros(batch.rewards.shape), returns=None)


ESTIMATORS = {
    "gae": AdvantageEstimator(needs_critic=True, needs_groups=False, compute=_gae),
    "rloo": AdvantageEstimator(False, True, _grouped(rloo), per_response=True),
    "grpo": AdvantageEstimator(False, True, _grouped(grpo), per_response=True),
    "dr_grpo": AdvantageEstimator(False, True, _grouped(dr_grpo), per_response=True),
    "reinforce_plus_plus": AdvantageEstimator(False, False, _reinforce_plus_plus),
    "reinforce_plus_plus_baseline": AdvantageEstimator(False, True, _reinforce_plus_plus_baseline),
    "none": AdvantageEstimator(False, False, _none),
}
