"""The losses that learners minimise, on flat target columns. Pure but for the model's forward pass.

Invariant: every objective returns a part of Σ weights·loss that is *summed* over micro-batches and ranks, and diagnostics that
add up the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from rlhf_ray.algorithms.aggregation import weighted_sum
from rlhf_ray.algorithms.corrections import importance_weights
from rlhf_ray.algorithms.diagnostics import Diagnostics, measure_policy, measure_value
from rlhf_ray.algorithms.kl import kl_loss
from rlhf_ray.algorithms.policy_loss import ppo_policy_loss
from rlhf_ray.algorithms.preference import bradley_terry_loss, pair_accuracy
from rlhf_ray.algorithms.summary import Summary, summarise
from rlhf_ray.algorithms.value_loss import ppo_value_loss
from rlhf_ray.batch import Batch, PaddedBatch
from rlhf_ray.config.algorithm import AlgorithmConfig

Objective = Callable[[nn.Module, PaddedBatch, Batch], tuple[Tensor, Diagnostics]]


def policy_objective(algorithm: AlgorithmConfig, beta: float) -> Objective:
    """PPO's clipped surrogate, with the KL term (coefficient `beta`), entropy bonus and engine correction configured."""

    def objective(model: nn.Module, padded: PaddedBatch, batch: Batch) -> tuple[Tensor, Diagnostics]:
        logprobs, entropy = model(padded, entropy=True)
        column = _columns(batch, logprobs.device)
        mask = torch.ones_like(logprobs, dtype=torch.bool)
        # Without old logprobs this pass *is* the old policy: the ratio is 1 and only its gradient matters.
        old = logprobs.detach() if batch.old_logprobs is None else column("old_logprobs")
        surrogate = ppo_policy_loss(
            logprobs,
            old,
            column("advantages"),
            mask,
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high,
            dual_clip=algorithm.dual_clip,
            behaviour_weights=_correction(algorithm, old, batch, column, mask),
        )
        loss = surrogate.loss
        if algorithm.kl.placement == "loss":
            loss = loss + beta * kl_loss(algorithm.kl.estimator, logprobs, column("reference_logprobs"), mask)
        return weighted_sum(loss, column("weights")), measure_policy(surrogate, logprobs, old, entropy, mask)

    return objective


def value_objective(algorithm: AlgorithmConfig) -> Objective:
    """The clipped value loss times its coefficient."""

    def objective(model: nn.Module, padded: PaddedBatch, batch: Batch) -> tuple[Tensor, Diagnostics]:
        values = model(padded)
        column = _columns(batch, values.device)
        mask = torch.ones_like(values, dtype=torch.bool)
        returns = column("returns")
        term = ppo_value_loss(values, column("old_values"), returns, mask, clip=algorithm.clip_value)
        loss = algorithm.value_coefficient * weighted_sum(term.loss, column("weights"))
        return loss, measure_value(term, values, returns, mask)

    return objective


def language_objective(model: nn.Module, padded: PaddedBatch, batch: Batch) -> tuple[Tensor, Diagnostics]:
    """Cross-entropy of the targets: supervised fine-tuning."""
    logprobs, entropy = model(padded, entropy=True)
    mask = torch.ones_like(logprobs, dtype=torch.bool)
    weights = _columns(batch, logprobs.device)("weights")
    return -weighted_sum(logprobs, weights), LanguageDiagnostics(summarise(-logprobs, mask), summarise(entropy, mask))


def preference_objective(centring: float) -> Objective:
    """Bradley–Terry over consecutive (chosen, rejected) sequences; `weights` holds a pair's weight at both."""

    def objective(model: nn.Module, padded: PaddedBatch, batch: Batch) -> tuple[Tensor, Diagnostics]:
        scores = model(padded)
        chosen, rejected = scores[0::2], scores[1::2]
        weights = _columns(batch, scores.device)("weights")[0::2]
        term = bradley_terry_loss(chosen, rejected, centring=centring)
        mask = weights > 0
        diagnostics = PreferenceDiagnostics(
            summarise(term, mask), summarise(pair_accuracy(chosen, rejected), mask), summarise(chosen - rejected, mask)
        )
        return weighted_sum(term, weights), diagnostics

    return objective


@dataclass(frozen=True)
class LanguageDiagnostics(Diagnostics):
    """Of supervised fine-tuning."""

    nll: Summary
    entropy: Summary

    def metrics(self) -> dict[str, float]:
        """Nats per target token."""
        return {"loss": self.nll.mean, "entropy": self.entropy.mean}


@dataclass(frozen=True)
class PreferenceDiagnostics(Diagnostics):
    """Of a reward model."""

    nll: Summary
    correct: Summary
    margin: Summary

    def metrics(self) -> dict[str, float]:
        """Loss in nats per pair, share of pairs ranked right, mean difference of the two scores."""
        return {"loss": self.nll.mean, "accuracy": self.correct.mean, "margin": self.margin.mean}


def _columns(batch: Batch, device: torch.device) -> Callable[[str], Tensor]:
    def column(name: str) -> Tensor:
        values: np.ndarray | None = getattr(batch, name)
        if values is None:
            raise ValueError(f"the batch has no column {name!r}, which this objective reads")
        return torch.from_numpy(values).to(device, non_blocking=True)

    return column


def _correction(
    algorithm: AlgorithmConfig, old: Tensor, batch: Batch, column: Callable[[str], Tensor], mask: Tensor
) -> Tensor | None:
    if algorithm.correction == "none":
        return None
    lower, upper = algorithm.correction_bounds
    return importance_weights(
        old,
        column("behaviour_logprobs"),
        mask,
        bound=algorithm.correction,
        upper=upper,
        lower=lower if algorithm.correction == "mask" else 0.0,
    )
