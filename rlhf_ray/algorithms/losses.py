"""The policy losses by their names in the config, with what each asks of the rest of the system.

Invariant: they all map the tokens of some whole sequences to a loss per token, so the learner does not know which one runs,
and summing `weights * loss` over any parts of a minibatch gives the loss of the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from rlhf_ray.algorithms.gspo import gspo_policy_loss, gspo_token_policy_loss
from rlhf_ray.algorithms.policy_loss import PolicyLoss, cispo_policy_loss, decoupled_ppo_policy_loss, ppo_policy_loss
from rlhf_ray.algorithms.segments import Segments


@dataclass(frozen=True)
class PolicyTokens:
    """Whole sequences of a minibatch; tensors of one shape, padded [B, T] or packed [N]."""

    logprobs: Tensor
    """Of the policy being trained; the only one with a gradient."""
    old_logprobs: Tensor
    """Of the policy that the update starts from."""
    behaviour_logprobs: Tensor
    """Of the engine that sampled."""
    advantages: Tensor
    mask: Tensor
    segments: Segments


@dataclass(frozen=True)
class Clip:
    """Where a loss stops trusting a ratio."""

    low: float
    high: float
    dual: float | None = None


@dataclass(frozen=True)
class PolicyLossKind:
    """One way from advantages to a loss."""

    compute: Callable[[PolicyTokens, Clip], PolicyLoss]
    has_dual_clip: bool = False
    of_sequences: bool = False
    """Its ratio is of whole sequences, and its objective a mean over them."""
    corrects_behaviour: bool = False
    """It weighs by what sampled the tokens itself."""


def policy_loss_named(name: str) -> PolicyLossKind:
    """The loss of a config's name. Raises ValueError for an unknown one."""
    if name not in POLICY_LOSSES:
        raise ValueError(f"unknown policy loss {name!r}; allowed: {', '.join(sorted(POLICY_LOSSES))}")
    return POLICY_LOSSES[name]


def _ppo(tokens: PolicyTokens, clip: Clip) -> PolicyLoss:
    return ppo_policy_loss(
        tokens.logprobs, tokens.old_logprobs, tokens.advantages, tokens.mask,
        clip_low=clip.low, clip_high=clip.high, dual_clip=clip.dual,
    )  # fmt: skip


def _decoupled_ppo(tokens: PolicyTokens, clip: Clip) -> PolicyLoss:
    return decoupled_ppo_policy_loss(
        tokens.logprobs, tokens.old_logprobs, tokens.behaviour_logprobs, tokens.advantages, tokens.mask,
        clip_low=clip.low, clip_high=clip.high, dual_clip=clip.dual,
    )  # fmt: skip


def _cispo(tokens: PolicyTokens, clip: Clip) -> PolicyLoss:
    return cispo_policy_loss(
        tokens.logprobs, tokens.old_logprobs, tokens.advantages, tokens.mask, clip_low=clip.low, clip_high=clip.high
    )


def _of_sequences(loss: Callable[..., PolicyLoss]) -> Callable[[PolicyTokens, Clip], PolicyLoss]:
    def compute(tokens: PolicyTokens, clip: Clip) -> PolicyLoss:
        return loss(
            tokens.logprobs, tokens.old_logprobs, tokens.advantages, tokens.mask, tokens.segments,
            clip_low=clip.low, clip_high=clip.high,
        )  # fmt: skip

    return compute


POLICY_LOSSES = {
    "ppo": PolicyLossKind(_ppo, has_dual_clip=True),
    "decoupled_ppo": PolicyLossKind(_decoupled_ppo, has_dual_clip=True, corrects_behaviour=True),
    "cispo": PolicyLossKind(_cispo),
    "gspo": PolicyLossKind(_of_sequences(gspo_policy_loss), of_sequences=True),
    "gspo_token": PolicyLossKind(_of_sequences(gspo_token_policy_loss), of_sequences=True),
}
