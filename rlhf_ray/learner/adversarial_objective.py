"""The discriminator's loss on batches of demonstrations and samples. Pure but for the model's forward pass.

A sequence's only target is its last token, where the score is read and its weight stands; its only label is 1 for a
demonstration and 0 for a sample. Invariant: weights are over the global minibatch, so the sum over micro-batches and ranks is the
loss, however they are cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlhf_ray.algorithms.adversarial import discriminator_accuracy, discriminator_loss
from rlhf_ray.algorithms.aggregation import weighted_sum
from rlhf_ray.algorithms.diagnostics import Diagnostics
from rlhf_ray.algorithms.statistics import Summary, summarise
from rlhf_ray.batch import Batch, ModelInput
from rlhf_ray.learner.objectives import Objective


def discriminator_objective(smoothing: float) -> Objective:
    """Binary cross-entropy, the labels of demonstrations smoothed (`discriminator_loss`)."""

    def objective(model: nn.Module, inputs: ModelInput, batch: Batch) -> tuple[Tensor, Diagnostics]:
        logits = model(inputs)[:, 0]
        demonstrated = torch.from_numpy(batch.labels[:, 0] > 0).to(logits.device)
        losses = discriminator_loss(logits, demonstrated, smoothing)
        right = discriminator_accuracy(logits, demonstrated)
        diagnostics = DiscriminatorDiagnostics(summarise(right, demonstrated), summarise(right, ~demonstrated))
        return weighted_sum(losses, torch.from_numpy(batch.weights).to(losses)), diagnostics

    return objective


@dataclass(frozen=True)
class DiscriminatorDiagnostics(Diagnostics):
    """Of an update, before its step."""

    demonstrations: Summary
    """1 where one was taken for what it is, ½ where it could be either."""
    samples: Summary

    @property
    def accuracy(self) -> float:
        """Of both sides, each counting half."""
        return 0.5 * (self.demonstrations.mean + self.samples.mean)
