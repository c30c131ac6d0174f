"""Ratios of probabilities, from log-probabilities that may be anything where they are masked.

Invariant: the mask is applied to the log-ratio, before `exp`: the backward pass of a difference only hands the (zero)
gradient on, but masking after `exp` would leave `0 * inf = NaN` there.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios above this (a ratio of 4.9e8) are cut before `exp`, which in float32 overflows at 88. The gradient is zero
beyond it. Nothing is cut from below: there `exp` underflows to an exact zero."""


def masked_log_ratio(numerator: Tensor, denominator: Tensor, mask: Tensor) -> Tensor:
    """`log(p / q)` of two log-probabilities of any one shape, in nats; 0 where masked, and no gradient there."""
    return (numerator - denominator).masked_fill(~mask.bool(), 0.0)


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """`exp(log_ratio)` with the logarithm cut at `MAX_LOG_RATIO`."""
    return torch.exp(log_ratio.clamp(max=MAX_LOG_RATIO))
