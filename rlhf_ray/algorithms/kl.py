"""Estimators of KL(policy || reference) from sampled tokens (Schulman, "Approximating KL Divergence", 2020).

With x sampled from the policy q, the reference p and r = p(x) / q(x):

- k1 = -log r: unbiased, but its expected *gradient* is zero, so use it in the reward, or in the loss with a weight;
- k2 = (log r)^2 / 2: biased as a value, but its expected gradient is that of KL(q || p);
- k3 = r - 1 - log r: unbiased and never negative; its expected gradient is that of the forward KL(p || q).

Invariant: every estimate is per token, 0 where masked, elementwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.algorithms.token_weights import MAX_LOG_RATIO, bounded_exp, masked_log_ratio


def k1(logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor) -> Tensor:
    """`logprobs - reference_logprobs`, in nats."""
    return masked_log_ratio(logprobs, reference_logprobs, mask)


def k2(logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Half the squared log-ratio."""
    return 0.5 * masked_log_ratio(logprobs, reference_logprobs, mask).square()


def k3(logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor) -> Tensor:
    """`r - 1 - log r`, with `log r` cut at `MAX_LOG_RATIO`; beyond it (r > 4.9e8) the value is constant and the gradient zero."""
    log_r = masked_log_ratio(reference_logprobs, logprobs, mask).clamp(max=MAX_LOG_RATIO)
    return torch.expm1(log_r) - log_r


ESTIMATORS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def kl_estimator(kind: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The estimator with a name of the config. Raises ValueError for an unknown name."""
    if kind not in ESTIMATORS:
        raise ValueError(f"unknown KL estimator {kind!r}; allowed: {', '.join(ESTIMATORS)}")
    return ESTIMATORS[kind]


def kl_loss(
    kind: str, logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor, old_logprobs: Tensor | None = None
) -> Tensor:
    """A KL term per token, which is added to the policy loss with a coefficient.

    With `old_logprobs`, those of the policy that sampled, the estimate is weighed by `policy / old`: then the expected gradient
    of k1 and of k3 is that of KL(policy || reference), also off policy (DeepSeek-V3.2, arXiv 2512.02556, section 3.1).

    Raises ValueError for k1 without those weights, whose expected gradient is zero, and for k2 with them, whose expected
    gradient would be that of E[k2], which is not a divergence.
    """
    estimate = kl_estimator(kind)(logprobs, reference_logprobs, mask)
    if old_logprobs is None:
        if kind == "k1":
            raise ValueError(
                "the expected gradient of k1 as a loss is zero; put it in the reward, weigh it by the policy's ratio, "
                "or use k2 (gradient of KL(policy || reference)) or k3"
            )
        return estimate
    if kind == "k2":
        raise ValueError("k2 has the gradient of KL(policy || reference) as it is; weigh k1 or k3 by the ratio, not k2")
    return bounded_exp(masked_log_ratio(logprobs, old_logprobs.detach(), mask)) * estimate


def sequence_kl(logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor) -> Tensor:
    """k1 summed over the tokens of each row, [B]: an unbiased estimate of the KL between the sequence distributions."""
    return k1(logprobs, reference_logprobs, mask).sum(dim=1)


MAX_RELATIVE_ERROR = 0.2


@dataclass(frozen=True)
class FixedKL:
    """A coefficient that never changes."""

    beta: float

    def update(self, kl: float, episodes: int) -> FixedKL:
        """The same controller: its coefficient is fixed."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {"kind": "fixed", **asdict(self)}


@dataclass(frozen=True)
class AdaptiveKL:
    """`beta *= 1 + clip(kl / target - 1, -0.2, 0.2) * episodes / horizon` (arXiv 1909.08593, section 2.2)."""

    beta: float
    target: float
    """Target of the KL per sequence, nats."""
    horizon: float = 10_000.0
    """Episodes after which an error of 20 % has changed beta by about 20 %."""

    def __post_init__(self) -> None:
        for name in ("beta", "target", "horizon"):
            if not getattr(self, name) > 0.0:
                raise ValueError(
                    f"AdaptiveKL.{name}={getattr(self, name)} must be > 0; use FixedKL for a constant beta"
                )

    def update(self, kl: float, episodes: int) -> AdaptiveKL:
        """The controller after a batch of `episodes` sequences whose mean token-summed k1 was `kl`, nats."""
        error = min(max(kl / self.target - 1.0, -MAX_RELATIVE_ERROR), MAX_RELATIVE_ERROR)
        return replace(self, beta=self.beta * (1.0 + error * episodes / self.horizon))

    def to_dict(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {"kind": "adaptive", **asdict(self)}


KLController = FixedKL | AdaptiveKL

_KINDS: dict[str, type[FixedKL | AdaptiveKL]] = {"fixed": FixedKL, "adaptive": AdaptiveKL}


def controller_from_dict(state: dict[str, Any]) -> KLController:
    """The controller from what `to_dict` returned. Raises ValueError for an unknown kind."""
    kind = state.get("kind")
    if kind not in _KINDS:
        raise ValueError(f"KL controller of kind {kind!r} in the checkpoint; allowed: {', '.join(_KINDS)}")
    return _KINDS[kind](**{name: value for name, value in state.items() if name != "kind"})
