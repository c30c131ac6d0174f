"""Importance weights for tokens that were sampled under other probabilities than the learner's.

The engine's kernels and precision, or an older policy, make `behaviour != proximal`; the weight is
`w = exp(proximal - behaviour)`, and what to do where it is large is a choice: truncate it (truncated importance
sampling, TIS: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"), drop the token
(IcePop: Ling Team, arXiv 2510.18855) or drop the whole sequence (masked importance sampling, MIS).

Invariants: weights are constants (detached); they are 1 where both agree and 0 where masked. A dropped token still
counts in the denominator of the loss: that is defined by the global batch, not by what the weights turn out to be.
The behaviour logprobs must be of the full distribution: an engine that samples with top-p or top-k renormalises them.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlhf_ray.algorithms.statistics import Segments

MAX_LOG_RATIO = 20.0
"""Log-ratios above this (a ratio of 4.9e8) are cut before `exp`, which in float32 overflows at 88. The gradient is zero
beyond it. Nothing is cut from below: there `exp` underflows to an exact zero."""


def masked_log_ratio(numerator: Tensor, denominator: Tensor, mask: Tensor) -> Tensor:
    """`log(p / q)` of two log-probabilities of any one shape, in nats; 0 where masked, and no gradient there."""
    return (numerator - denominator).masked_fill(~mask.bool(), 0.0)


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """`exp(log_ratio)` with the logarithm cut at `MAX_LOG_RATIO`."""
    return torch.exp(log_ratio.clamp(max=MAX_LOG_RATIO))


def importance_weights(
    proximal_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    *,
    level: Literal["token", "sequence"] = "token",
    bound: Literal["truncate", "mask"] = "truncate",
    upper: float = 2.0,
    lower: float = 0.0,
    segments: Segments | None = None,
) -> Tensor:
    """Weights of the shape of the logprobs.

    Args:
        proximal_logprobs: of the policy that the update starts from, computed by the learner.
        rollout_logprobs: of whatever sampled the tokens.
        level: `token` weighs each token by its own ratio (low variance, biased); `sequence` weighs all tokens of a
            sequence by the product of its ratios (the exact correction, high variance).
        bound: `truncate` cuts weights to at most `upper`; `mask` sets weights outside [lower, upper] to zero.
        upper, lower: bounds of the ratio; `upper=math.inf` for none. `lower` is for `mask` only.
        segments: which tokens are one sequence, for the level `sequence`; None: each row of [B, T] is one.

    Raises ValueError for bounds that do not enclose 1, a lower bound with `truncate`, or an unknown choice.
    """
    _check(level, bound, upper, lower)
    valid = mask.bool()
    log_ratio = masked_log_ratio(proximal_logprobs.detach(), rollout_logprobs.detach(), valid)
    if level == "sequence":
        segments = segments if segments is not None else Segments.rows(valid)
        log_ratio = segments.spread(segments.sum(log_ratio))
    weights = bounded_exp(log_ratio)
    if bound == "truncate":
        weights = weights.clamp(max=upper)
    else:
        weights = weights.masked_fill((weights < lower) | (weights > upper), 0.0)
    return weights.masked_fill(~valid, 0.0)


def _check(level: str, bound: str, upper: float, lower: float) -> None:
    if level not in ("token", "sequence"):
        raise ValueError(f"unknown level {level!r} of importance weights; allowed: token, sequence")
    if bound not in ("truncate", "mask"):
        raise ValueError(f"unknown bound {bound!r} of importance weights; allowed: truncate, mask")
    if not 0.0 <= lower <= 1.0 <= upper:
        raise ValueError(f"bounds [{lower}, {upper}] of importance weights must satisfy 0 <= lower <= 1 <= upper")
    if bound == "truncate" and lower != 0.0:
        raise ValueError(f"lower={lower} has no meaning for truncated importance weights; use bound='mask' or lower=0")
