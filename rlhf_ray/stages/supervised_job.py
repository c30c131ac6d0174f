"""What a supervised stage is: its task, its job description, and its state after each step."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from rlhf_ray.algorithms.diagnostics import Diagnostics
from rlhf_ray.batch import Batch, ModelInput
from rlhf_ray.config.supervised import EarlyStoppingConfig, SupervisedConfig
from rlhf_ray.config.telemetry import WandbConfig
from rlhf_ray.learner.sharded_model import ShardedModel
from rlhf_ray.models.loading import Dtype
from rlhf_ray.runs.run_folder import RunFolder

Documents = Mapping[str, Any]
"""File name to JSON content."""
FIT = "fit.json"
"""The file with the last `FitState`, in the model's folder and in each checkpoint."""


@dataclass(frozen=True)
class FitState:
    """The state of training after `step` optimizer steps."""

    step: int = 0
    best_step: int | None = None
    """The step with the lowest held-out loss; None before the first measurement."""
    best_loss: float = math.inf
    reference_loss: float = math.inf
    """The loss of the last measurement that counted as an improvement."""
    without_improvement: int = 0
    """The number of measurements since then."""
    stopped: bool = False
    """Early stopping has ended the training."""

    def after(self, step: int) -> FitState:
        """The state after an optimizer step."""
        return replace(self, step=step)

    def measured(self, loss: float, stopping: EarlyStoppingConfig | None) -> FitState:
        """The state after a measurement of the held-out loss.

        Any lower loss is the best one; how much lower it is matters only for early stopping.
        """
        state = self
        if loss < self.best_loss:
            state = replace(state, best_step=self.step, best_loss=loss)
        if loss < self.reference_loss - (stopping.min_improvement if stopping else 0.0):
            return replace(state, reference_loss=loss, without_improvement=0)
        without = self.without_improvement + 1
        return replace(
            state, without_improvement=without, stopped=stopping is not None and without >= stopping.patience
        )


class Task:
    """What a stage trains. Each rank has one. The batches hold relative weights, which the loop scales to a sum of 1."""

    def load(self, model: str, dtype: Dtype, attention: str, seed: int) -> nn.Module:
        """Load the module to train from the Hugging Face folder `model`."""
        raise NotImplementedError

    def objective(self, model: nn.Module, inputs: ModelInput, batch: Batch) -> tuple[Tensor, Diagnostics]:
        """Compute the loss of a micro-batch (see `learner.objectives.Objective`)."""
        raise NotImplementedError

    def observe(self, diagnostics: Diagnostics) -> None:
        """Use the diagnostics of a training step, summed over the ranks. The default does nothing."""

    def state(self) -> Any:
        """What a checkpoint keeps besides model and optimizer; the same on every rank. The default is None."""
        return None

    def restore(self, state: Any) -> None:
        """Restore what `state()` returned. The default does nothing."""

    def finish(self, model: ShardedModel, held_out: Batch, micro_batch_tokens: int) -> Documents:
        """Complete the model's config before the model is saved. All ranks take part.

        Returns:
            Files to write into the model's folder, as JSON. The default is none.
        """
        return {}


@dataclass(frozen=True)
class SupervisedJob:
    """Everything that a rank needs to know, except the data."""

    kind: Literal["sft", "reward_model"]
    folder: RunFolder
    model: str
    """Hugging Face folder to start from."""
    config: SupervisedConfig
    task: Task
    seed: int
    member: int = 1
    """Which model of an ensemble this is, counted from 1."""
    wandb: WandbConfig | None = None

    @property
    def name(self) -> str:
        """The name of the stage's folders and curves."""
        return self.kind if self.member == 1 else f"{self.kind}_{self.member}"

    @property
    def model_folder(self) -> Path:
        """Where the model appears when the stage is complete."""
        return self.folder.path / self.name

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints of an interrupted stage are."""
        return self.folder.checkpoints / self.name

    @property
    def stop_file(self) -> Path:
        """The driver creates this file to ask the ranks to stop after the current step."""
        return self.checkpoints / "stop"

    def steps(self, batch: Batch) -> int:
        """The number of optimizer steps of the whole stage."""
        return self.config.epochs * math.ceil(len(batch.element_sizes) / self.config.batch_size)

    def result(self) -> FitState | None:
        """How training ended; None while the stage is not complete."""
        if not (self.model_folder / FIT).is_file():
            return None
        return FitState(**json.loads((self.model_folder / FIT).read_text()))
