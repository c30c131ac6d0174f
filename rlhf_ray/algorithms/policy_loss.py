"""The clipped surrogate of PPO (arXiv 1707.06347, equation 7), with the variants that are the same formula.

Invariants: elementwise; 0 and without gradient where masked; at ratio 1 the gradient is the policy gradient; the
gradient is exactly zero where `clipped` is set.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .ratios import bounded_exp, masked_log_ratio


@dataclass(frozen=True)
class PolicyLoss:
    """Per token, all of the shape of the logprobs."""

    loss: Tensor
    ratio: Tensor
    """Detached; 1 where masked."""
    clipped: Tensor
    """bool: the clip holds and there is no gradient."""


def ppo_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    behaviour_weights: Tensor | None = None,
) -> PolicyLoss:
    """`w * max(-A * ratio, -A * clip(ratio, 1 - clip_low, 1 + clip_high))` per token.

    Args:
        logprobs: of the policy being trained; the only argument with a gradient.
        old_logprobs: of the proximal policy, the one the update starts from.
        advantages: per token.
        mask: valid tokens.
        clip_low, clip_high: clip range; a larger upper one is DAPO's clip-higher (arXiv 2503.14476).
        dual_clip: c > 1 bounds the loss by `c * |A|` where A < 0 (arXiv 1912.09729); None for no bound.
        behaviour_weights: `w = proximal / behaviour` from `corrections`, for tokens that an engine sampled under
            other probabilities or an older policy (decoupled PPO, arXiv 2110.00641; arXiv 2505.24298). None means 1.

    Raises ValueError for a `dual_clip` that is not above 1.
    """
    if dual_clip is not None and dual_clip <= 1.0:
        raise ValueError(
            f"dual_clip={dual_clip} would cut the loss of on-policy tokens; it must be > 1 (3 is usual) or None"
        )
    valid = mask.bool()
    advantages = advantages.detach().masked_fill(~valid, 0.0)
    ratio = bounded_exp(masked_log_ratio(logprobs, old_logprobs.detach(), valid))
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high))
    fixed = ratio.detach()
    clipped = ((advantages > 0) & (fixed > 1.0 + clip_high)) | ((advantages < 0) & (fixed < 1.0 - clip_low))
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
        clipped |= (advantages < 0) & (fixed > dual_clip)
    if behaviour_weights is not None:
        loss = loss * behaviour_weights.detach().masked_fill(~valid, 0.0)
    return PolicyLoss(loss=loss, ratio=fixed, clipped=clipped)
