"""REINFORCE++ (arXiv 2501.03262): rewards to go without a critic, normalised over the global batch instead of by prompt.

Invariants: statistics are over everything that is passed in, so pass the global batch; masked tokens get zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_ray.algorithms.advantages import gae, group_baseline, whiten
from rlhf_ray.algorithms.rewards import at_last_token


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
    """`(R' - mean R') / std R'`, where R' are the returns with each score lowered by the mean of its prompt's.

    The baseline is of the scores only; a KL penalty in the rewards keeps its own place. Without one and at gamma 1 this
    is the whitening of `score - group mean` over tokens.

    Args: rewards, mask: [B, T]; scores: [B], as they are in the rewards; groups: int64 [B], equal for one prompt.
    Returns: [B, T]. Raises ValueError for a group of one, whose baseline would be its own score.
    """
    baseline = group_baseline(scores, groups, "REINFORCE++-baseline")
    return reinforce_plus_plus(rewards - at_last_token(baseline.to(rewards.dtype), mask), mask, gamma)
