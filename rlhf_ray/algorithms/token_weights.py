"""The weight of each token in a loss: by the aggregation over a minibatch, and by importance sampling.

Aggregation turns the masks of a whole minibatch into one weight per token, and the loss is `sum(weights * token_loss)`. Weights
are computed once over the *global* minibatch: code that splits it into micro-batches, ranks or packed rows takes the weights
along and *sums*; there is no mean of means. Rows without a valid token change nothing. If an engine averages gradients over R
ranks, multiply the local loss by R.

Importance weights are for tokens that were sampled under other probabilities than the learner's. The engine's kernels and
precision, or an older policy, make `rollout != proximal`; the weight is `w = exp(proximal - rollout)`. Where it is large it is
truncated (truncated importance sampling, TIS: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
training"), or the token is dropped (IcePop: Ling Team, arXiv 2510.18855), or the whole sequence is dropped (masked importance
sampling, MIS). These weights are constants (detached); they are 1 where both agree and 0 where masked. A dropped token still
counts in the denominator of the loss, which is defined by the global batch. Rollout log-probabilities must be of the full
distribution: an engine that samples with top-p or top-k renormalises them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from rlhf_ray.algorithms.statistics import Segments

Aggregation = Literal["token_mean", "sequence_mean", "constant"]


def token_weights(
    aggregation: Aggregation, mask: Tensor, max_length: int | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Weights [B, T], 0 where masked.

    - `token_mean`: every token counts the same (DAPO, arXiv 2503.14476): `1 / number of valid tokens`.
    - `sequence_mean`: every sequence counts the same (GRPO, arXiv 2402.03300): `1 / (sequences * its valid tokens)`.
    - `constant`: `1 / (sequences * max_length)`, without a length bias (Dr. GRPO, arXiv 2503.20783); `max_length` is
      the run's response limit in tokens, not the longest in the batch.

    Raises ValueError for an unknown name, a mask without a valid token, or `constant` without a `max_length` >= 1.
    """
    if aggregation not in _AGGREGATIONS:
        raise ValueError(f"unknown aggregation {aggregation!r}; allowed: {', '.join(_AGGREGATIONS)}")
    if aggregation == "constant" and (max_length is None or max_length < 1):
        raise ValueError(
            f"aggregation 'constant' needs max_length >= 1, the response limit in tokens, got {max_length}"
        )
    valid = mask.bool().to(dtype)
    lengths = valid.sum(dim=1, keepdim=True)
    if not lengths.any():
        raise ValueError("a minibatch without a valid token has no loss; drop it before the update")
    return valid / _AGGREGATIONS[aggregation](lengths, max_length)


def weighted_sum(token_loss: Tensor, weights: Tensor) -> Tensor:
    """`sum(weights * token_loss)`, a scalar: the loss of a minibatch, or of a part of it. Both have the same shape."""
    return (token_loss * weights).sum()


def _sequences(lengths: Tensor) -> Tensor:
    return (lengths > 0).sum()


_AGGREGATIONS: dict[str, Callable[[Tensor, int | None], Tensor]] = {
    "token_mean": lambda lengths, _: lengths.sum(),
    "sequence_mean": lambda lengths, _: _sequences(lengths) * lengths.clamp(min=1),
    "constant": lambda lengths, max_length: _sequences(lengths) * max_length,
}

MAX_LOG_RATIO = 20.0
"""Log-ratios above this (a ratio of 4.9e8) are cut before `exp`, which in float32 overflows at 88. The gradient is zero
beyond it. Nothing is cut from below: there `exp` underflows to an exact zero."""


def masked_log_ratio(numerator: Tensor, denominator: Tensor, mask: Tensor) -> Tensor:
    """`log(p / q)` of two log-probabilities with the same shape, in nats; 0 and without a gradient where masked."""
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
    """Importance weights with the shape of the log-probabilities.

    Args:
        proximal_logprobs: under the policy from which the update starts, computed by the learner.
        rollout_logprobs: reported by the engine that sampled the tokens.
        level: `token` weighs each token by its own ratio (low variance, biased); `sequence` weighs all tokens of a
            sequence by the product of its ratios (the exact correction, high variance).
        bound: `truncate` cuts weights to at most `upper`; `mask` sets weights outside [lower, upper] to zero.
        upper, lower: bounds of the ratio; `upper=math.inf` for none. `lower` is for `mask` only.
        segments: which tokens belong to one sequence, for the level `sequence`; None: each row of [B, T] is one sequence.

    Raises ValueError for bounds that do not enclose 1, a lower bound with `truncate`, or an unknown level or bound.
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
        raise ValueError(f"lower={lower} has no effect on truncated importance weights; use bound='mask' or lower=0")
