"""Advantage estimates: GAE with a critic; RLOO and (Dr.) GRPO from groups of responses to one prompt; REINFORCE++; whitening.

Each `estimate_*` function is the implementation of an entry of `registry.ESTIMATORS`.

Invariants: statistics are over all rows that are passed in, so pass the global batch; masked tokens get zero; the recursion of
GAE *skips* masked tokens (it neither decays across them nor bootstraps from their values), so a response with holes has the
same advantages as the response without the masked tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_ray.algorithms.rewards import at_last_token
from rlhf_ray.algorithms.statistics import summarise

WHITENING_EPSILON = 1e-8


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al., arXiv 1506.02438, equation 16).

    `delta_t = r_t + gamma * V_{t+1} - V_t; A_t = delta_t + gamma * lam * A_{t+1}`, where t+1 is the next *valid* token
    and the value after the last one is 0.

    Args: rewards, values, mask: [B, T]; gamma, lam: in [0, 1].
    Returns: advantages [B, T] and returns `advantages + values` [B, T]; both 0 where masked, both detached.
    """
    valid = mask.bool()
    rewards_by_time = rewards.detach().masked_fill(~valid, 0.0).unbind(1)
    values_by_time = values.detach().masked_fill(~valid, 0.0).unbind(1)
    valid_by_time = valid.unbind(1)
    next_value = next_advantage = values.new_zeros(len(values))
    reversed_advantages = []
    for t in reversed(range(values.shape[1])):
        delta = rewards_by_time[t] + gamma * next_value - values_by_time[t]
        next_advantage = torch.where(valid_by_time[t], delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(valid_by_time[t], values_by_time[t], next_value)
        reversed_advantages.append(next_advantage)
    carried = torch.stack(reversed_advantages[::-1], dim=1) if reversed_advantages else torch.zeros_like(values)
    advantages = carried.masked_fill(~valid, 0.0)
    return advantages, (advantages + values.detach()).masked_fill(~valid, 0.0)


def rloo(scores: Tensor, groups: Tensor) -> Tensor:
    """REINFORCE leave-one-out (Kool et al. 2019; arXiv 2402.14740): the score minus the mean of the *other* scores.

    `K / (K - 1) * (r_i - mean)` for a group of K. scores: [B]; groups: int64 [B], equal for responses to one prompt.
    Returns: [B]. Raises ValueError for a group of one, whose baseline would be an empty mean.
    """
    centred, sizes, _ = _centre_in_groups(scores, groups, "RLOO")
    return centred * sizes / (sizes - 1)


def grpo(scores: Tensor, groups: Tensor, eps: float = 1e-4) -> Tensor:
    """Group-relative advantages (GRPO, arXiv 2402.03300): `(r - mean) / (std + eps)`, the std with divisor K - 1.

    scores: [B]; groups: int64 [B], equal for responses to one prompt. Returns: [B]. Raises ValueError for a group of one.
    """
    centred, sizes, index = _centre_in_groups(scores, groups, "GRPO")
    squares = torch.zeros_like(centred).scatter_add(0, index, centred.square())[index]
    return centred / ((squares / (sizes - 1)).sqrt() + eps)


def dr_grpo(scores: Tensor, groups: Tensor) -> Tensor:
    """`r - mean` of the group (Dr. GRPO, arXiv 2503.20783): without the std, which would favour easy and hard prompts.

    The paper's other half is the aggregation `constant`, without a length bias. Arguments and result as in `grpo`.
    """
    return _centre_in_groups(scores, groups, "Dr. GRPO")[0]


def group_baseline(scores: Tensor, groups: Tensor, method: str) -> Tensor:
    """The mean of each score's group, [B]. Raises ValueError with the name `method` for a group of one."""
    return scores - _centre_in_groups(scores, groups, method)[0]


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """`(x - mean) * rsqrt(var + 1e-8)` over the valid entries. With `shift_mean=False` the mean is added back.

    The variance is biased (as in lm-human-preferences), so it is defined for a single entry. Both arguments have the same
    shape; the result is 0 where masked. Rewards are whitened with `shift_mean=False`, advantages with True.
    """
    valid = mask.bool()
    summary = summarise(x, valid)
    if summary.count == 0:
        return torch.zeros_like(x)
    mean, scale = summary.mean, (summary.variance + WHITENING_EPSILON) ** -0.5
    whitened = (x - mean) * scale
    return (whitened if shift_mean else whitened + mean).masked_fill(~valid, 0.0)


def _centre_in_groups(scores: Tensor, groups: Tensor, method: str) -> tuple[Tensor, Tensor, Tensor]:
    """Scores minus the mean of their group, size of each score's group, and index of the group; each [B]."""
    if scores.shape != groups.shape:
        raise ValueError(f"{method} needs a group id for each score: {tuple(scores.shape)} and {tuple(groups.shape)}")
    ids, index, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    if (counts < 2).any():
        single = ids[counts < 2].tolist()
        raise ValueError(
            f"{method} is undefined for a group of one: groups {single[:8]} ({len(single)} in all) have a single "
            f"response; sample at least 2 responses to each prompt, or use the estimator 'gae'"
        )
    sizes = counts[index].to(scores.dtype)
    means = torch.zeros(len(ids), dtype=scores.dtype, device=scores.device).scatter_add(0, index, scores)[index] / sizes
    return scores - means, sizes, index


def returns_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """`R_t = r_t + gamma * R_{t+1}` over valid tokens: GAE without a critic, at lambda 1. rewards, mask: [B, T] → [B, T]."""
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, lam=1.0)[0]


def reinforce_plus_plus(rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """`(R - mean R) / std R`, `R_t = sum_{k >= t} gamma^(k-t) r_k`, over the tokens of the global batch.

    Token rewards hold the score at the last token and the KL penalty at each: at gamma 1 the return is
    `score - beta * sum_{k >= t} KL_k`. rewards, mask: [B, T] → [B, T].
    """
    return whiten(returns_to_go(rewards, mask, gamma), mask)


def reinforce_plus_plus_baseline(
    rewards: Tensor, mask: Tensor, scores: Tensor, groups: Tensor, gamma: float = 1.0
) -> Tensor:
    """`(R' - mean R') / std R'`, where R' are the returns after each score is lowered by the mean score of its prompt.

    The baseline is computed from the scores only and does not change a KL penalty in the rewards. Without a penalty and at
    gamma 1 this is the whitening of `score - group mean` over tokens.

    Args: rewards, mask: [B, T]; scores: [B], as they are in the rewards; groups: int64 [B], equal for one prompt.
    Returns: [B, T]. Raises ValueError for a group of one, whose baseline would be its own score.
    """
    baseline = group_baseline(scores, groups, "REINFORCE++-baseline")
    return reinforce_plus_plus(rewards - at_last_token(baseline.to(rewards.dtype), mask), mask, gamma)


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
    """[B, T], the critic's; None without a critic."""
    gamma: float = 1.0
    lam: float = 0.95


@dataclass(frozen=True)
class Advantages:
    """What the policy and the critic are trained on; 0 where masked."""

    advantages: Tensor
    """[B, T], whitened only if that is part of the estimator's definition."""
    returns: Tensor | None
    """[B, T], targets of the critic; None without a critic."""


def estimate_gae(batch: EstimatorInput) -> Advantages:
    """GAE, with returns as targets of the critic. Raises ValueError without the critic's values."""
    if batch.values is None:
        raise ValueError("the estimator 'gae' needs the values of a critic; configure one, or use 'rloo' or 'grpo'")
    return Advantages(*gae(batch.rewards, batch.values, batch.mask, batch.gamma, batch.lam))


def _per_response(score_advantages: Callable[[Tensor, Tensor], Tensor]) -> Callable[[EstimatorInput], Advantages]:
    """Sums the rewards of each response and gives all of its tokens the advantage of that sum."""

    def compute(batch: EstimatorInput) -> Advantages:
        valid = batch.mask.bool()
        scores = batch.rewards.masked_fill(~valid, 0.0).sum(dim=1)
        per_response = score_advantages(scores, batch.groups)
        return Advantages(per_response.unsqueeze(1).expand_as(batch.rewards).masked_fill(~valid, 0.0), returns=None)

    return compute


estimate_rloo = _per_response(rloo)
estimate_grpo = _per_response(grpo)
estimate_dr_grpo = _per_response(dr_grpo)


def estimate_reinforce_plus_plus(batch: EstimatorInput) -> Advantages:
    """REINFORCE++ over the global batch."""
    return Advantages(reinforce_plus_plus(batch.rewards, batch.mask, batch.gamma), returns=None)


def estimate_reinforce_plus_plus_baseline(batch: EstimatorInput) -> Advantages:
    """REINFORCE++ with the mean score of each group as the baseline."""
    advantages = reinforce_plus_plus_baseline(batch.rewards, batch.mask, batch.scores, batch.groups, batch.gamma)
    return Advantages(advantages, returns=None)


def estimate_none(batch: EstimatorInput) -> Advantages:
    """Zeros: the policy learns from a teacher alone."""
    return Advantages(batch.rewards.new_zeros(batch.rewards.shape), returns=None)
