"""Policy losses and the value loss.

The functions `(PolicyTokens, Clip) -> PolicyLoss` at the end are the implementations of the entries of `registry.POLICY_LOSSES`.

Invariant: a policy loss maps the tokens of whole sequences to a loss per token, and the sum of `weights * loss` over any split of
a minibatch is the loss of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlhf_ray.algorithms.statistics import Segments
from rlhf_ray.algorithms.token_weights import bounded_exp, importance_weights, masked_log_ratio


@dataclass(frozen=True)
class PolicyLoss:
    """Values per token, all with the shape of the log-probabilities."""

    loss: Tensor
    ratio: Tensor
    """Detached; 1 where masked."""
    clipped: Tensor
    """bool: the ratio is clipped. Min-max surrogates have no gradient then; CISPO keeps it, with the clipped weight."""

    def weighted(self, weights: Tensor) -> PolicyLoss:
        """The loss times importance weights (see `token_weights`), which are constants and 0 where masked."""
        return replace(self, loss=self.loss * weights.detach())


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> PolicyLoss:
    """`max(-A * ratio, -A * clip(ratio, 1 - clip_low, 1 + clip_high))`, for ratios of tokens or of sequences."""
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
        logprobs: under the policy being trained; the only argument with a gradient.
        old_logprobs: under the proximal policy, from which the update starts; `ratio = exp(logprobs - old_logprobs)`.
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
    rollout_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> PolicyLoss:
    """`-w * min(ratio * A, clip(ratio) * A)`: PPO whose trust region is not around the policy that sampled the tokens.

    `ratio = pi / pi_prox` and `w = pi_prox / mu`, where pi_prox is the policy from which the update starts and mu the
    one that sampled, possibly some updates earlier (arXiv 2110.00641; AReaL, arXiv 2505.24298).
    The weight has no bound; PPO with a truncated correction is the same with a bound.
    """
    surrogate = ppo_policy_loss(
        logprobs, proximal_logprobs, advantages, mask, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip
    )
    return surrogate.weighted(importance_weights(proximal_logprobs, rollout_logprobs, mask, upper=math.inf))


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

    REINFORCE with a clipped importance weight: where PPO drops a token's gradient, this loss keeps it with the weight at the
    bound. The value of the loss has no meaning; its gradient is `-clip(ratio) * A` for each log-probability. `clip_low=1`
    means no lower bound, as in the paper. Arguments as in `ppo_policy_loss`.
    """
    valid = mask.bool()
    advantages = advantages.detach().masked_fill(~valid, 0.0)
    ratio = bounded_exp(masked_log_ratio(logprobs.detach(), old_logprobs.detach(), valid))
    weight = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss = -weight * advantages * logprobs.masked_fill(~valid, 0.0)
    return PolicyLoss(loss, ratio, clipped=weight != ratio)


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

    s is the same for all tokens of a sequence, and A must be, too: an advantage of the whole response. The clip range is for
    a geometric mean and hence two orders of magnitude narrower than PPO's (the paper has 3e-4 and 4e-4).
    Arguments as in `ppo_policy_loss`; `segments` tells which tokens belong to one sequence.
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

    Each token's ratio has the value of its sequence's ratio and the gradient of its own log-probability. With one advantage
    for a whole response, value and gradient are those of `gspo_policy_loss`.
    """
    valid = mask.bool()
    log_ratio = masked_log_ratio(logprobs.detach(), old_logprobs.detach(), valid)
    sequence_ratio = segments.spread(bounded_exp(segments.mean(log_ratio, valid))).masked_fill(~valid, 1.0)
    ratio = sequence_ratio * torch.exp(masked_log_ratio(logprobs, logprobs.detach(), valid))
    return clipped_surrogate(ratio, advantages.detach().masked_fill(~valid, 0.0), clip_low, clip_high)


@dataclass(frozen=True)
class ValueLoss:
    """Values per token, both with the shape of the values."""

    loss: Tensor
    clipped: Tensor
    """bool: the clipped term is the larger one, so there is no gradient."""


def ppo_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float = 0.2
) -> ValueLoss:
    """`max((v - R)^2, (clip(v, v_old - clip, v_old + clip) - R)^2) / 2` per token; `clip=math.inf` is no clip.

    Only `values` has a gradient; `old_values` are those that the advantages were computed from; `returns` are the targets.
    """
    valid = mask.bool()
    values = values.masked_fill(~valid, 0.0)
    returns = returns.detach().masked_fill(~valid, 0.0)
    squared_error = (values - returns).square()
    old_values = old_values.detach().masked_fill(~valid, 0.0)
    clipped_error = (values.clamp(old_values - clip, old_values + clip) - returns).square()
    loss = 0.5 * torch.maximum(squared_error, clipped_error)
    return ValueLoss(loss=loss, clipped=clipped_error.detach() > squared_error.detach())


@dataclass(frozen=True)
class PolicyTokens:
    """Whole sequences of a minibatch. All tensors have the same shape, padded [B, T] or packed [N]."""

    logprobs: Tensor
    """Log-probabilities under the policy being trained; the only tensor with a gradient."""
    old_logprobs: Tensor
    """Log-probabilities under the policy from which the update starts."""
    rollout_logprobs: Tensor
    """Log-probabilities that the engine reported when it sampled; `old_logprobs` if no correction reads them."""
    advantages: Tensor
    mask: Tensor
    segments: Segments


@dataclass(frozen=True)
class Clip:
    """The range [1 - low, 1 + high] to which ratios are clipped."""

    low: float
    high: float
    dual: float | None = None
    """Factor c of the dual clip: the loss of negative advantages is at most c * |A|. None: no such bound."""


def ppo_loss(tokens: PolicyTokens, clip: Clip) -> PolicyLoss:
    """`ppo_policy_loss` as an entry of the registry."""
    return ppo_policy_loss(
        tokens.logprobs, tokens.old_logprobs, tokens.advantages, tokens.mask,
        clip_low=clip.low, clip_high=clip.high, dual_clip=clip.dual,
    )  # fmt: skip


def decoupled_ppo_loss(tokens: PolicyTokens, clip: Clip) -> PolicyLoss:
    """`decoupled_ppo_policy_loss` as an entry of the registry."""
    return decoupled_ppo_policy_loss(
        tokens.logprobs, tokens.old_logprobs, tokens.rollout_logprobs, tokens.advantages, tokens.mask,
        clip_low=clip.low, clip_high=clip.high, dual_clip=clip.dual,
    )  # fmt: skip


def cispo_loss(tokens: PolicyTokens, clip: Clip) -> PolicyLoss:
    """`cispo_policy_loss` as an entry of the registry."""
    return cispo_policy_loss(
        tokens.logprobs, tokens.old_logprobs, tokens.advantages, tokens.mask, clip_low=clip.low, clip_high=clip.high
    )


def _sequence_loss(loss: Callable[..., PolicyLoss]) -> Callable[[PolicyTokens, Clip], PolicyLoss]:
    def compute(tokens: PolicyTokens, clip: Clip) -> PolicyLoss:
        return loss(
            tokens.logprobs, tokens.old_logprobs, tokens.advantages, tokens.mask, tokens.segments,
            clip_low=clip.low, clip_high=clip.high,
        )  # fmt: skip

    return compute


gspo_loss = _sequence_loss(gspo_policy_loss)
gspo_token_loss = _sequence_loss(gspo_token_policy_loss)
