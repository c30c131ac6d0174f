"""Group Sequence Policy Optimization (GSPO, arXiv 2507.18071): the ratio is of sequences, and so is the clip.

Invariants: a sequence has one ratio, over its valid tokens; the loss is 0 and without gradient where masked; aggregated as
a mean over sequences it is the paper's objective; packed and padded batches give the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_ray.algorithms.policy_loss import PolicyLoss, clipped_surrogate
from rlhf_ray.algorithms.ratios import bounded_exp, masked_log_ratio
from rlhf_ray.algorithms.segments import Segments


def gspo_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    segments: Segments,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> PolicyLoss:
    """`max(-A * s, -A * clip(s, 1 - clip_low, 1 + clip_high))`, `s = exp(mean_t log(pi / pi_old))`.

    s is the same for all tokens of a sequence, and so must A be: an advantage of the whole response. The clip range is
    that of a geometric mean, hence two orders narrower than PPO's (the paper has 3e-4 and 4e-4).
    Arguments as in `ppo_policy_loss`; `segments` says which tokens are one sequence.
    """
    valid = mask.bool()
    log_ratio = masked_log_ratio(logprobs, old_logprobs.detach(), valid)
    ratio = segments.spread(bounded_exp(segments.mean(log_ratio, valid))).masked_fill(~valid, 1.0)
    return clipped_surrogate(ratio, advantages.detach().masked_fill(~valid, 0.0), clip_low, clip_high)


def gspo_token_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    segments: Segments,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> PolicyLoss:
    """GSPO with an advantage for each token: `s_t = sg(s) * pi_t / sg(pi_t)` in place of s (GSPO-token).

    Each token's ratio has the value of its sequence's and the gradient of its own log-probability. With one advantage
    for a whole response, value and gradient are those of `gspo_policy_loss`.
    """
    valid = mask.bool()
    log_ratio = masked_log_ratio(logprobs.detach(), old_logprobs.detach(), valid)
    sequence_ratio = segments.spread(bounded_exp(segments.mean(log_ratio, valid))).masked_fill(~valid, 1.0)
    ratio = sequence_ratio * torch.exp(masked_log_ratio(logprobs, logprobs.detach(), valid))
    return clipped_surrogate(ratio, advantages.detach().masked_fill(~valid, 0.0), clip_low, clip_high)
