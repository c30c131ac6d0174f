"""Metrics of PPO updates: token statistics that stay exact however the batch is split.

Invariant: each `measure_*` function measures a part of a batch and returns summaries; the sum of the parts' summaries equals the
summaries of the whole. Only `metrics()` divides. Keys are those of `metrics.jsonl`; means are over valid tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Self

from torch import Tensor

from rlhf_ray.algorithms.kl import k3
from rlhf_ray.algorithms.losses import PolicyLoss, ValueLoss
from rlhf_ray.algorithms.statistics import Summary, summarise


@dataclass(frozen=True)
class Diagnostics:
    """Summaries that are added and moved field by field. Subclasses are frozen dataclasses whose fields are `Summary` objects."""

    def metrics(self) -> dict[str, float]:
        """The metrics that are recorded, by name. Empty by default."""
        return {}

    def __add__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def cpu(self) -> Self:
        """A copy in host memory, to be sent to another process."""
        return type(self)(*(getattr(self, f.name).cpu() for f in fields(self)))


@dataclass(frozen=True)
class PolicyDiagnostics(Diagnostics):
    """Statistics of a policy update."""

    ratio: Summary
    clipped: Summary
    approx_kl: Summary
    entropy: Summary
    correction: Summary = field(default_factory=Summary.empty)
    """Importance weights of the tokens, if the config has a correction."""
    demonstrations: Summary = field(default_factory=Summary.empty)
    """Cross-entropy of the tokens of demonstrations, if the batch has some."""
    teacher_kl: Summary = field(default_factory=Summary.empty)
    """KL(policy || teacher) of each token's distribution, if a teacher is in the loss."""

    def metrics(self) -> dict[str, float]:
        """Entropy and KL in nats per token. `approx_kl` is k3 of KL(old || new)."""
        optional = {
            "policy/correction_mean": self.correction,
            "policy/ptx_loss": self.demonstrations,
            "teacher/kl": self.teacher_kl,
        }
        return {
            "policy/ratio_mean": self.ratio.mean,
            "policy/ratio_variance": self.ratio.variance,
            "policy/ratio_max": self.ratio.maximum,
            "policy/clip_fraction": self.clipped.mean,
            "policy/approx_kl": self.approx_kl.mean,
            "policy/entropy": self.entropy.mean,
        } | {name: summary.mean for name, summary in optional.items() if summary.count > 0}


def measure_policy(
    policy_loss: PolicyLoss,
    logprobs: Tensor,
    old_logprobs: Tensor,
    entropy: Tensor,
    mask: Tensor,
    correction: Tensor | None = None,
    demonstrations: Tensor | None = None,
    teacher_kl: Tensor | None = None,
) -> PolicyDiagnostics:
    """Diagnostics of one part of a minibatch; all tensors have the same shape.

    `correction` holds the importance weights of the tokens; `demonstrations` is a mask of the tokens of demonstrations;
    `teacher_kl` is the exact KL from a teacher.
    """
    return PolicyDiagnostics(
        ratio=summarise(policy_loss.ratio, mask),
        clipped=summarise(policy_loss.clipped, mask),
        approx_kl=summarise(k3(old_logprobs.detach(), logprobs.detach(), mask), mask),
        entropy=summarise(entropy, mask),
        correction=_summary(correction, mask),
        demonstrations=_summary(None if demonstrations is None else -logprobs, demonstrations),
        teacher_kl=_summary(teacher_kl, mask),
    )


@dataclass(frozen=True)
class ValueDiagnostics(Diagnostics):
    """Statistics of a value update."""

    value: Summary
    target: Summary
    error: Summary
    clipped: Summary

    def metrics(self) -> dict[str, float]:
        """`explained_variance` is `1 - var(return - value) / var(return)`; 0 if all returns are equal."""
        spread = self.target.variance
        return {
            "value/mean": self.value.mean,
            "value/variance": self.value.variance,
            "return/mean": self.target.mean,
            "return/variance": spread,
            "value/explained_variance": 1.0 - self.error.variance / spread if spread > 0.0 else 0.0,
            "value/clip_fraction": self.clipped.mean,
        }


def measure_value(value_loss: ValueLoss, values: Tensor, returns: Tensor, mask: Tensor) -> ValueDiagnostics:
    """Diagnostics of one part of a minibatch; all tensors have the same shape."""
    return ValueDiagnostics(
        value=summarise(values, mask),
        target=summarise(returns, mask),
        error=summarise(returns - values, mask),
        clipped=summarise(value_loss.clipped, mask),
    )


def _summary(values: Tensor | None, mask: Tensor | None) -> Summary:
    return Summary.empty() if values is None else summarise(values, mask)
