"""The supervised stages: how long they train, when they stop, what they keep."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlhf_ray.config.learner import LearnerConfig
from rlhf_ray.config.section import Section


class EarlyStoppingConfig(Section):
    """End a stage that gets no better on held-out data."""

    patience: int = Field(3, ge=1)
    """Measurements in a row without improvement after which it ends."""
    min_improvement: float = Field(0.0, ge=0)
    """What counts as one: the held-out loss falls below the best by more than this, nats."""


class SupervisedConfig(Section):
    """A supervised stage (SFT or reward model) on Ray Train with DeepSpeed."""

    epochs: int = Field(1, ge=1)
    """Passes over the data."""
    batch_size: int = Field(64, ge=1)
    """Dialogues (or labels) of one optimizer step, over all ranks."""
    learner: LearnerConfig = LearnerConfig()
    """Ranks, precision, sharding, optimizer."""
    evaluate_every: int = Field(50, ge=1)
    """Optimizer steps between measurements on held-out data; there is one before the first step and one after the last."""
    early_stopping: EarlyStoppingConfig | None = None
    """When to end before the last epoch; null: never."""
    keep: Literal["best", "last"] = "best"
    """The model that stays: the one with the lowest held-out loss measured, or the one after the last step."""
    checkpoint_every: int = Field(500, ge=1)
    """Optimizer steps between checkpoints, from which an interrupted stage goes on; they are removed when it is complete."""
    max_failures: int = Field(2, ge=0)
    """How often workers that died are started again, from the newest checkpoint, before the stage fails."""
