"""The clipped surrogates that weigh token by token: PPO, decoupled PPO, CISPO.

Invariants: elementwise; 0 and without gradient where masked; at ratio 1 the gradient is the policy gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlhf_ray.algorithms.corrections import importance_weights
from rlhf_ray.algorithms.ratios import bounded_exp, masked_log_ratio


@dataclass(frozen=True)
class PolicyLoss:
    """Per token, all of the shape of the logprobs."""

    loss: Tensor
    ratio: Tensor
    """Detached; 1 where masked."""
    clipped: Tensor
    """bool: the clip holds. For min-max surrogates there is no gradient then; CISPO keeps it, at the clipped weight."""

    def weighted(self, weights: Tensor) -> PolicyLoss:
        """The loss times importance weights (see `corrections`), which are constants and 0 where masked."""
        return replace(self, loss=self.loss * weights.detach())


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> PolicyLoss:
    """`max(-A * ratio, -A * clip(ratio, 1 - clip_low, 1 + clip_high))`, whatever the ratio is of."""
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high))
    fixed = ratio.detach()
    clipped = ((advantages > 0) & (fixed > 1.0 + clip_high)) | ((advantages < 0) & (fixed < 1.0 - clip_low))
    return PolicyLoss(loss, fixed, clipped)


def ppo_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> PolicyLoss:
    """`max(-A * ratio, -A * clip(ratio, 1 - clip_low, 1 + clip_high))` per token (PPO, arXiv 1707.06347, equation 7).

    Args:
        logprobs: of the policy being trained; the only argument with a gradient.
        old_logprobs: of the proximal policy, the one the update starts from; `ratio = exp(logprobs - old_logprobs)`.
        advantages: per token.
        mask: valid tokens.
        clip_low, clip_high: clip range; a larger upper one is DAPO's clip-higher (arXiv 2503.14476).
        dual_clip: c > 1 bounds the loss by `c * |A|` where A < 0 (arXiv 1912.09729); None for no bound.

    Raises ValueError for a `dual_clip` that is not above 1.
    """
    if dual_clip is not None and dual_clip <= 1.0:
        raise ValueError(
            f"dual_clip={dual_clip} would cut the loss of on-policy tokens; it must be > 1 (3 is usual) or None"
        )
    valid = mask.bool()
    advantages = advantages.detach().masked_fill(~valid, 0.0)
    ratio = bounded_exp(masked_log_ratio(logprobs, old_logprobs.detach(), valid))
    surrogate = clipped_surrogate(ratio, advantages, clip_low, clip_high)
    if dual_clip is None:
        return surrogate
    negative = advantages < 0
    loss = torch.where(negative, torch.minimum(surrogate.loss, -dual_clip * advantages), surrogate.loss)
    return replace(surrogate, loss=loss, clipped=surrogate.clipped | (negative & (surrogate.ratio > dual_clip)))


def decoupled_ppo_policy_loss(
    logprobs: Tensor,
    proximal_logprobs: Tensor,
    behaviour_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> PolicyLoss:
    """`-w * min(ratio * A, clip(ratio) * A)`: PPO whose trust region is not around what sampled the tokens.

    `ratio = pi / pi_prox` and `w = pi_prox / mu`, where pi_prox is the policy that the update starts from and mu the
    one that sampled, perhaps some updates ago (arXiv 2110.00641; AReaL, arXiv 2505.24298).
    The weight has no bound; PPO with a truncated correction is the same with one.
    """
    surrogate = ppo_policy_loss(
        logprobs, proximal_logprobs, advantages, mask, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip
    )
    return surrogate.weighted(importance_weights(proximal_logprobs, behaviour_logprobs, mask, upper=math.inf))


def cispo_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 1.0,
    clip_high: float = 4.0,
) -> PolicyLoss:
    """`-sg(clip(ratio, 1 - clip_low, 1 + clip_high)) * A * logprobs` per token (CISPO, arXiv 2506.13585).

    REINFORCE with a clipped importance weight: where PPO drops a token's gradient, this one keeps it at the bound. The
    value of the loss says nothing, its gradient is `-clip(ratio) * A` for each log-probability. `clip_low=1` is no lower
    bound, as in the paper. Arguments as in `ppo_policy_loss`.
    """
    valid = mask.bool()
    advantages = advantages.detach().masked_fill(~valid, 0.0)
    ratio = bounded_exp(masked_log_ratio(logprobs.detach(), old_logprobs.detach(), valid))
    weight = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss = -weight * advantages * logprobs.masked_fill(~valid, 0.0)
    return PolicyLoss(loss, ratio, clipped=weight != ratio)
