"""SFT and reward models on Ray Train, seen from the driver: what a stage is, its start, its progress.

Invariant: the model's folder appears when the stage is complete, and not before, so its presence says that the stage is done.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import ray
from torch import nn

from rlhf_ray.algorithms.diagnostics import Diagnostics
from rlhf_ray.batch import Batch
from rlhf_ray.config.loading import ConfigError
from rlhf_ray.config.supervised import EarlyStoppingConfig, SupervisedConfig
from rlhf_ray.config.telemetry import WandbConfig
from rlhf_ray.learner.objectives import Objective
from rlhf_ray.learner.sharded_model import ShardedModel
from rlhf_ray.runs.metrics import read_metrics
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.runs.storage.location import is_uri, portable
from rlhf_ray.runtime.stopping import RunStopped, StopRequest
from rlhf_ray.stages.rank import train_rank
from rlhf_ray.telemetry.progress import StageProgress
from rlhf_ray.telemetry.wandb_log import WandbLog


@dataclass(frozen=True)
class FitState:
    """After `step` optimizer steps."""

    step: int = 0
    best_step: int | None = None
    """After which the held-out loss was lowest; None: not measured yet."""
    best_loss: float = math.inf
    reference_loss: float = math.inf
    """Of the last measurement that counted as an improvement."""
    without_improvement: int = 0
    """Measurements since that one."""
    stopped: bool = False
    """No step follows."""

    def after(self, step: int) -> FitState:
        """An optimizer step was taken."""
        return replace(self, step=step)

    def measured(self, loss: float, stopping: EarlyStoppingConfig | None) -> FitState:
        """The held-out loss was measured. Any lower one is the best; by how much matters for stopping only."""
        state = self
        if loss < self.best_loss:
            state = replace(state, best_step=self.step, best_loss=loss)
        if loss < self.reference_loss - (stopping.min_improvement if stopping else 0.0):
            return replace(state, reference_loss=loss, without_improvement=0)
        without = self.without_improvement + 1
        return replace(
            state, without_improvement=without, stopped=stopping is not None and without >= stopping.patience
        )


Kind = Literal["sft", "reward_model"]
Documents = Mapping[str, Any]
"""File name to what it holds."""
FIT = "fit.json"
"""Beside the model: how its training ended."""


class Task(Protocol):
    """What a stage teaches; every rank has one. Its batches hold relative weights, which the loop makes sum to 1."""

    objective: Objective

    def load(self, model: str, dtype: str, attention: str, seed: int) -> nn.Module:
        """The module to train, from the folder `model`."""

    def observe(self, diagnostics: Diagnostics) -> None:
        """Look at what a training step, of all ranks, gave."""

    def state(self) -> Any:
        """What a checkpoint has to keep beside model and optimizer; the same on every rank."""

    def restore(self, state: Any) -> None:
        """Go on from a `state()`."""

    def finish(self, model: ShardedModel, held_out: Batch, micro_batch_tokens: int) -> Documents:
        """Write into the model's config what stands there, before it is saved. All ranks take part.

        Returns:
            What is to stand beside the model, as JSON.
        """


@dataclass(frozen=True)
class SupervisedJob:
    """Everything that a rank needs to know, but for the data."""

    kind: Kind
    folder: RunFolder
    model: str
    """Hugging Face folder to start from."""
    config: SupervisedConfig
    task: Task
    seed: int
    member: int = 1
    """Which of an ensemble's models it is."""
    wandb: WandbConfig | None = None
    """Where the driver sends the metrics, too."""

    @property
    def name(self) -> str:
        """Of its folders and curves."""
        return self.kind if self.member == 1 else f"{self.kind}_{self.member}"

    @property
    def model_folder(self) -> Path:
        """Where the model appears."""
        return self.folder.path / self.name

    @property
    def checkpoints(self) -> Path:
        """What an interrupted stage goes on from."""
        return self.folder.checkpoints / self.name

    @property
    def stop_file(self) -> Path:
        """Its presence asks the ranks to leave after the step that they are in."""
        return self.checkpoints / "stop"

    def steps(self, batch: Batch) -> int:
        """Optimizer steps of the whole stage."""
        return self.config.epochs * math.ceil(len(batch.element_sizes) / self.config.batch_size)


def run_supervised(job: SupervisedJob, train: Batch, held_out: Batch, stop: StopRequest | None = None) -> FitState:
    """Train on Ray Train, show progress, and leave the model in the stage's folder; how it ended.

    A stage that was interrupted goes on from its newest checkpoint, and so does one whose workers died; one that is complete is
    left alone.

    Raises:
        RunStopped: `stop` was asked for; the steps taken are in a checkpoint.
    """
    if (job.model_folder / FIT).is_file():
        return FitState(**json.loads((job.model_folder / FIT).read_text()))
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig

    from rlhf_ray.stages.ray_train import StageTrainer

    workers = job.config.learner.workers
    environment = {**({} if workers.gpus else {"DS_ACCELERATOR": "cpu"}), **workers.process_environment}
    trainer = StageTrainer(
        train_loop_per_worker=train_rank,
        train_loop_config={"job": ray.put(job), "train": ray.put(train), "held_out": ray.put(held_out)},
        torch_config=TorchConfig(backend="nccl" if workers.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers.count,
            use_gpu=workers.gpus > 0,
            resources_per_worker={"CPU": workers.cpus, **({"GPU": workers.gpus} if workers.gpus else {})}
            | workers.resources
            | (_beside_the_driver(job) if is_uri(portable(job.folder.path)) else {}),
        ),
        run_config=RunConfig(
            name=job.name,
            storage_path=str(job.folder.path / "ray_train"),
            worker_runtime_env={"env_vars": environment},
            failure_config=FailureConfig(max_failures=job.config.max_failures),
        ),
    )
    job.stop_file.unlink(missing_ok=True)
    with (
        ThreadPoolExecutor(1) as executor,
        StageProgress(job.folder.name, job.name, job.steps(train)) as progress,
        WandbLog(job.wandb, job.folder, job.name) as wandb,
    ):
        running = executor.submit(trainer.fit)
        while not running.done():
            time.sleep(0.5)
            if stop is not None and stop.made:
                job.checkpoints.mkdir(parents=True, exist_ok=True)
                job.stop_file.touch()
            _show(job.folder.stage_metrics(job.name), progress, wandb)
        running.result()
        _show(job.folder.stage_metrics(job.name), progress, wandb)
        if not (job.model_folder / FIT).is_file():
            raise RunStopped(f"stopped, as asked, after step {progress.step} of {job.name}")
    return FitState(**json.loads((job.model_folder / FIT).read_text()))


def _beside_the_driver(job: SupervisedJob) -> dict[str, float]:
    """The resource that brings all ranks to the driver's node: of a run on a store they share its working folder.

    Raises:
        ConfigError: the node is too small.
    """
    workers = job.config.learner.workers
    me = ray.get_runtime_context().get_node_id()
    here = next(node for node in ray.nodes() if node["NodeID"] == me)
    for name, each in (("CPU", workers.cpus), ("GPU", workers.gpus)):
        if each * workers.count > here["Resources"].get(name, 0.0):
            raise ConfigError(
                f"{job.kind}.learner.workers: {workers.count} of {each:g} {name} do not fit on the driver's node, which has "
                f"{here['Resources'].get(name, 0.0):g}; with folder on a store the ranks of this stage share it: start the run "
                "on a larger one, or set folder to a path that all nodes see"
            )
    return {f"node:{here['NodeManagerAddress']}": 0.001}


def _show(metrics: Path, progress: StageProgress, wandb: WandbLog) -> None:
    records = read_metrics(metrics) if metrics.is_file() else []
    wandb.follow(records)
    if records:
        latest = {key: value for record in records[-20:] for key, value in record.items() if value is not None}
        if (step := int(latest.pop("step"))) > progress.step:
            progress.update(step, latest)
