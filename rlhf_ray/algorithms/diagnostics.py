"""What to watch while PPO trains: token statistics that stay exact however the batch is split.

Invariant: each `measure_*` looks at a part of a batch and returns summaries; adding the parts' summaries equals
measuring the whole. Only `metrics()` divides. Keys follow `metrics.jsonl`; means are over valid tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Self

from torch import Tensor

from rlhf_ray.algorithms.kl import k3
from rlhf_ray.algorithms.losses import PolicyLoss, ValueLoss
from rlhf_ray.algorithms.statistics import Summary, summarise


class Diagnostics:
    """Summaries that are added and moved field by field; subclasses are frozen dataclasses of `Summary`."""

    def metrics(self) -> dict[str, float]:
        """The figures that are recorded, by metric name. The default is none."""
        return {}

    def __add__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))  # type: ignore[arg-type]

    def cpu(self) -> Self:
        """The same on the host, to be sent to another process."""
        return type(self)(*(getattr(self, f.name).cpu() for f in fields(self)))  # type: ignore[arg-type]


@dataclass(frozen=True)
class PolicyDiagnostics(Diagnostics):
    """Of a policy update."""

    ratio: Summary
    clipped: Summary
    approx_kl: Summary
    entropy: Summary
    correction: Summary = field(default_factory=Summary.empty)
    """Importance weights of the tokens, where they are corrected."""
    demonstrations: Summary = field(default_factory=Summary.empty)
    """Cross-entropy of the demonstrations' tokens, where there are some."""
    teacher_kl: Summary = field(default_factory=Summary.empty)
    """KL(policy || teacher) of each token's distribution, where a teacher is in the loss."""

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
    """Of one part of a minibatch; all tensors of one shape.

    `correction` are the importance weights of the tokens; `demonstrations` marks tokens that are no sampled ones;
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
    """Of a value update."""

    value: Summary
    target: Summary
    error: Summary
    clipped: Summary

    def metrics(self) -> dict[str, float]:
        """`explained_variance` is `1 - var(return - value) / var(return)`; 0 where the returns do not vary."""
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
    """Of one part of a minibatch; all tensors of one shape."""
    return ValueDiagnostics(
        value=summarise(values, mask),
        target=summarise(returns, mask),
        error=summarise(returns - values, mask),
        clipped=summarise(value_loss.clipped, mask),
    )


def _summary(values: Tensor | None, mask: Tensor | None) -> Summary:
    return Summary.empty() if values is None else summarise(values, mask)
