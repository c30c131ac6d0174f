"""Estimators of KL(policy || reference) from sampled tokens (Schulman, "Approximating KL Divergence", 2020).

With x sampled from the policy q, the reference p and r = p(x) / q(x):

- k1 = -log r: unbiased, but its expected *gradient* is zero, so it belongs in the reward and never in the loss;
- k2 = (log r)^2 / 2: biased as a value, but its expected gradient is that of KL(q || p);
- k3 = r - 1 - log r: unbiased and never negative; its expected gradient is that of the forward KL(p || q).

Invariant: every estimate is per token, 0 where masked, elementwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ratios import MAX_LOG_RATIO, masked_log_ratio


def k1(logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor) -> Tensor:
    """`logprobs - reference_logprobs`, in nats."""
    return masked_log_ratio(logprobs, reference_logprobs, mask)


def k2(logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Half the squared log-ratio."""
    return 0.5 * masked_log_ratio(logprobs, reference_logprobs, mask).square()


def k3(logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor) -> Tensor:
    """`r - 1 - log r`, with `log r` cut at `MAX_LOG_RATIO`; beyond it (r > 4.9e8) value and gradient stay put."""
    log_r = masked_log_ratio(reference_logprobs, logprobs, mask).clamp(max=MAX_LOG_RATIO)
    return torch.expm1(log_r) - log_r


KL_LOSSES = {"k2": k2, "k3": k3}


def kl_loss(kind: str, logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor) -> Tensor:
    """A KL term per token, to be added to the policy loss with a coefficient. Raises ValueError for an unfit kind."""
    if kind not in KL_LOSSES:
        reason = ": the expected gradient of k1 is zero; put it in the reward" if kind == "k1" else ""
        raise ValueError(f"no KL loss {kind!r}{reason}; allowed: {', '.join(KL_LOSSES)}")
    return KL_LOSSES[kind](logprobs, reference_logprobs, mask)


def sequence_kl(logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor) -> Tensor:
    """k1 summed over the tokens of each row, [B]: an unbiased estimate of the KL between the sequence distributions."""
    return k1(logprobs, reference_logprobs, mask).sum(dim=1)
