"""Advantage estimates: GAE with a critic; RLOO and (Dr.) GRPO from groups of responses to one prompt; whitening.

Invariants: statistics are over everything that is passed in, so pass the global batch; masked tokens get zero; the
recursion of GAE *skips* masked tokens (it neither decays across them nor bootstraps from their values), which makes a
response with holes equal to the same response with the holes cut out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_ray.algorithms.statistics import Summary, summarise

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
    next_value = torch.zeros_like(values[:, 0]) if values.shape[1] else None
    next_advantage = next_value
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
    """The mean of each score's group, [B]. Raises ValueError, naming `method`, for a group of one."""
    return scores - _centre_in_groups(scores, groups, method)[0]


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True, over: Summary | None = None) -> Tensor:
    """`(x - mean) * rsqrt(var + 1e-8)` over the valid entries, plus the mean again where `shift_mean` is False.

    The variance is biased (as in lm-human-preferences): it is defined for one entry and adds up over shards. Where `x`
    is only a shard of the batch, pass the summed summaries of all shards as `over`. Any one shape; 0 where masked.
    Rewards are whitened with `shift_mean=False`, which keeps their mean; advantages with True.
    """
    valid = mask.bool()
    summary = over if over is not None else summarise(x, valid)
    if summary.count == 0:
        return torch.zeros_like(x)
    mean, scale = summary.mean, (summary.variance + WHITENING_EPSILON) ** -0.5
    whitened = (x - mean) * scale
    return (whitened if shift_mean else whitened + mean).masked_fill(~valid, 0.0)


def _centre_in_groups(scores: Tensor, groups: Tensor, method: str) -> tuple[Tensor, Tensor, Tensor]:
    """Scores minus their group's mean [B], the size of each score's group [B], and its index [B]."""
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
