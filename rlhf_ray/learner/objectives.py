"""The losses that learners minimise, on flat target columns. Pure functions, except for the model's forward pass.

Invariant: an objective returns the micro-batch's part of Σ weights·loss and its diagnostics; both are *summed* over
micro-batches and ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlhf_ray.algorithms.adversarial import discriminator_accuracy, discriminator_loss
from rlhf_ray.algorithms.diagnostics import Diagnostics, measure_policy, measure_value
from rlhf_ray.algorithms.kl import kl_loss
from rlhf_ray.algorithms.losses import Clip, PolicyTokens, ppo_value_loss
from rlhf_ray.algorithms.statistics import Segments, Summary, summarise
from rlhf_ray.algorithms.token_weights import importance_weights, weighted_sum
from rlhf_ray.batch import Batch, ModelInput
from rlhf_ray.config.algorithm import AlgorithmConfig
from rlhf_ray.learner.teacher import FrozenTeacher

Objective = Callable[[nn.Module, ModelInput, Batch], tuple[Tensor, Diagnostics]]


def policy_objective(algorithm: AlgorithmConfig, beta: float, teacher: FrozenTeacher | None = None) -> Objective:
    """The configured policy loss with its correction, minus the entropy bonus, plus the KL term (coefficient `beta`), plus
    the KL of each token's whole distribution from the teacher's.

    The tokens of demonstrations in the batch have a cross-entropy loss only.
    """
    loss_kind = algorithm.loss_kind
    corrected = loss_kind.corrects_rollout_policy or algorithm.correction != "none"
    clip = Clip(algorithm.clip_low, algorithm.clip_high, algorithm.dual_clip)

    def objective(model: nn.Module, inputs: ModelInput, batch: Batch) -> tuple[Tensor, Diagnostics]:
        if teacher is None:
            (logprobs, entropy), distance = model(inputs, entropy=True), None
        else:
            logprobs, entropy, distance = model(inputs, entropy=True, teacher_logits=teacher.logits(inputs))
        column = _columns(batch, logprobs.device)
        ptx_weights = None if batch.ptx_weights is None else column("ptx_weights")
        demonstrated = None if ptx_weights is None else ptx_weights > 0
        mask = torch.ones_like(logprobs, dtype=torch.bool) if demonstrated is None else ~demonstrated
        # Without old logprobs this pass *is* the old policy: the ratio is 1 and only its gradient matters.
        old = logprobs.detach() if batch.old_logprobs is None else column("old_logprobs")
        tokens = PolicyTokens(
            logprobs=logprobs,
            old_logprobs=old,
            rollout_logprobs=column("rollout_logprobs") if corrected else old,
            advantages=column("advantages"),
            mask=mask,
            segments=Segments.packed(torch.from_numpy(batch.target_counts), logprobs.device),
        )
        surrogate = loss_kind.compute(tokens, clip)
        correction = _correction(algorithm, tokens)
        if correction is not None:
            surrogate = surrogate.weighted(correction)
        loss = surrogate.loss
        if algorithm.entropy_coefficient:
            loss = loss - algorithm.entropy_coefficient * entropy
        if (kl := algorithm.kl).placement == "loss":
            weigh_by = old if kl.importance_weighted else None
            loss = loss + beta * kl_loss(kl.used_estimator, logprobs, column("reference_logprobs"), mask, weigh_by)
        if teacher is not None and distance is not None:
            loss = loss + teacher.coefficient * distance
        total = weighted_sum(loss, column("weights"))
        if ptx_weights is not None:
            total = total - weighted_sum(logprobs, ptx_weights)
        return total, measure_policy(surrogate, logprobs, old, entropy, mask, correction, demonstrated, distance)

    return objective


def value_objective(algorithm: AlgorithmConfig) -> Objective:
    """The clipped value loss, times its coefficient."""

    def objective(model: nn.Module, inputs: ModelInput, batch: Batch) -> tuple[Tensor, Diagnostics]:
        values = model(inputs)
        column = _columns(batch, values.device)
        mask = torch.ones_like(values, dtype=torch.bool)
        returns = column("returns")
        term = ppo_value_loss(values, column("old_values"), returns, mask, clip=algorithm.clip_value)
        loss = algorithm.value_coefficient * weighted_sum(term.loss, column("weights"))
        return loss, measure_value(term, values, returns, mask)

    return objective


def language_objective(model: nn.Module, inputs: ModelInput, batch: Batch) -> tuple[Tensor, Diagnostics]:
    """Cross-entropy of the targets, for supervised fine-tuning."""
    logprobs, entropy = model(inputs, entropy=True)
    mask = torch.ones_like(logprobs, dtype=torch.bool)
    weights = _columns(batch, logprobs.device)("weights")
    return -weighted_sum(logprobs, weights), LanguageDiagnostics(summarise(-logprobs, mask), summarise(entropy, mask))


@dataclass(frozen=True)
class LanguageDiagnostics(Diagnostics):
    """Diagnostics of supervised fine-tuning."""

    nll: Summary
    entropy: Summary

    def metrics(self) -> dict[str, float]:
        """Both in nats per target token."""
        return {"loss": self.nll.mean, "entropy": self.entropy.mean}


def _columns(batch: Batch, device: torch.device) -> Callable[[str], Tensor]:
    """A function that moves a column of the batch to the device. An objective calls it once for each column that it reads."""

    def column(name: str) -> Tensor:
        values = getattr(batch, name)
        if values is None:
            raise ValueError(f"the batch has no column {name!r}, which this objective reads")
        return torch.from_numpy(values).to(device, non_blocking=True)

    return column


def _correction(algorithm: AlgorithmConfig, tokens: PolicyTokens) -> Tensor | None:
    if algorithm.correction == "none":
        return None
    lower, upper = algorithm.correction_bounds
    return importance_weights(
        tokens.old_logprobs,
        tokens.rollout_logprobs,
        tokens.mask,
        level=algorithm.correction_level,
        bound=algorithm.correction,
        upper=upper,
        lower=lower if algorithm.correction == "mask" else 0.0,
        segments=tokens.segments,
    )


def discriminator_objective(smoothing: float) -> Objective:
    """Binary cross-entropy; the labels of demonstrations are smoothed (`discriminator_loss`)."""

    def objective(model: nn.Module, inputs: ModelInput, batch: Batch) -> tuple[Tensor, Diagnostics]:
        logits = model(inputs)[:, 0]
        column = _columns(batch, logits.device)
        demonstrated = column("labels")[:, 0] > 0
        losses = discriminator_loss(logits, demonstrated, smoothing)
        right = discriminator_accuracy(logits, demonstrated)
        diagnostics = DiscriminatorDiagnostics(summarise(right, demonstrated), summarise(right, ~demonstrated))
        return weighted_sum(losses, column("weights")), diagnostics

    return objective


@dataclass(frozen=True)
class DiscriminatorDiagnostics(Diagnostics):
    """Diagnostics of a discriminator update, measured before the step."""

    demonstrations: Summary
    """1 where a demonstration was recognised, ½ where the score is 0."""
    samples: Summary

    @property
    def accuracy(self) -> float:
        """The mean accuracy of demonstrations and samples, each counting half."""
        return 0.5 * (self.demonstrations.mean + self.samples.mean)
