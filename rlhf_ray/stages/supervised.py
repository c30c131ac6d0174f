"""SFT and reward models on Ray Train: the loop that every rank runs, and its start from the driver.

Invariants: an optimizer step sees the same global minibatch whatever the number of ranks; the model's folder appears when the
stage is complete, and not before, so its presence says that the stage is done.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import ray
from torch import nn

from rlhf_ray.algorithms.diagnostics import Diagnostics
from rlhf_ray.batch import Batch
from rlhf_ray.config.stages import SupervisedConfig
from rlhf_ray.learner import engine as deepspeed_engine
from rlhf_ray.learner.engine import learning_rate
from rlhf_ray.learner.objectives import Objective
from rlhf_ray.learner.planning import plan_micro_batches
from rlhf_ray.learner.sharded_model import ShardedModel
from rlhf_ray.telemetry.metrics import MetricsLog, read_metrics
from rlhf_ray.telemetry.progress import StageProgress
from rlhf_ray.telemetry.run_folder import RunFolder

Kind = Literal["sft", "reward_model"]


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

    def finish(self, model: ShardedModel, held_out: Batch, micro_batch_tokens: int) -> None:
        """Write into the model's config what stands there, before it is saved. All ranks take part."""


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

    def steps(self, batch: Batch) -> int:
        """Optimizer steps of the whole stage."""
        return self.config.epochs * math.ceil(len(batch.element_sizes) / self.config.batch_size)


def run_supervised(job: SupervisedJob, train: Batch, held_out: Batch) -> None:
    """Train on Ray Train, show progress, and leave the model in the stage's folder."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    workers = job.config.learner.workers
    environment = {**({} if workers.gpus else {"DS_ACCELERATOR": "cpu"}), **workers.process_environment}
    trainer = TorchTrainer(
        train_loop_per_worker=_train_loop,
        train_loop_config={"job": job, "train": ray.put(train), "held_out": ray.put(held_out)},
        torch_config=TorchConfig(backend="nccl" if workers.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers.count,
            use_gpu=workers.gpus > 0,
            resources_per_worker={"CPU": workers.cpus, **({"GPU": workers.gpus} if workers.gpus else {})}
            | workers.resources,
        ),
        run_config=RunConfig(
            name=job.kind,
            storage_path=str(job.folder.path / "ray_train"),
            worker_runtime_env={"env_vars": environment},
        ),
    )
    with ThreadPoolExecutor(1) as executor, StageProgress(job.folder.name, job.kind, job.steps(train)) as progress:
        running = executor.submit(trainer.fit)
        while not running.done():
            time.sleep(0.5)
            _show(job.folder.stage_metrics(job.kind), progress)
        running.result()
        _show(job.folder.stage_metrics(job.kind), progress)


def _show(metrics: Path, progress: StageProgress) -> None:
    records = read_metrics(metrics) if metrics.is_file() else []
    if records:
        latest = {key: value for record in records[-20:] for key, value in record.items() if value is not None}
        if (step := int(latest.pop("step"))) > progress.step:
            progress.update(step, latest)


def _train_loop(arguments: dict[str, Any]) -> None:
    """One rank."""
    job: SupervisedJob = arguments["job"]
    train, held_out = ray.get([arguments["train"], arguments["held_out"]])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    config = job.config.learner
    deepspeed_engine.prepare_process(config.workers.threads, config.workers.gpus > 0)
    deepspeed_engine.join_initialised(config.workers.gpus > 0)
    model = ShardedModel(deepspeed_engine.build(lambda: _load(job), config), config, rank, world)
    if rank == 0:
        with MetricsLog(job.folder, job.kind) as log:
            _fit(job, model, train, held_out, log)
    else:
        _fit(job, model, train, held_out, None)
    _save(job, model, held_out)


def _fit(job: SupervisedJob, model: ShardedModel, train: Batch, held_out: Batch, log: MetricsLog | None) -> None:
    """All optimizer steps, with a measurement on held-out data every so many and after the last."""
    total = job.steps(train)
    for step, batch in enumerate(_minibatches(job, train), start=1):
        began = time.perf_counter()
        result = model.step(
            batch,
            _my_micro_batches(job, model, batch),
            job.task.objective,
            learning_rate(job.config.learner.optimizer, step - 1, total),
        )
        job.task.observe(result.diagnostics)
        metrics = dict(result.diagnostics.metrics())
        metrics |= {"grad_norm": result.grad_norm, "learning_rate": result.learning_rate}
        metrics["throughput/tokens_per_s"] = int(batch.lengths.sum()) / (time.perf_counter() - began)
        if step % job.config.evaluate_every == 0 or step == total:
            measured = _measure(job, model, held_out)
            metrics |= {f"heldout/{name}": value for name, value in measured.items()}
        if log is not None:
            log.log(step, metrics)


def _minibatches(job: SupervisedJob, train: Batch) -> Iterator[Batch]:
    """Global minibatches, in another order in every epoch."""
    elements = len(train.element_sizes)
    for epoch in range(job.config.epochs):
        order = np.random.default_rng([job.seed, epoch]).permutation(elements)
        for start in range(0, elements, job.config.batch_size):
            yield _weighted(train.select_elements(order[start : start + job.config.batch_size]))


def _weighted(batch: Batch) -> Batch:
    """The weights of a mean over the global batch: over the tokens of SFT, over the elements of a reward model."""
    return batch.with_columns(weights=batch.weights / batch.weights.sum(dtype=np.float64).astype(np.float32))


def _measure(job: SupervisedJob, model: ShardedModel, held_out: Batch) -> dict[str, float]:
    batch = _weighted(held_out)
    measured: Diagnostics = model.measure(batch, _my_micro_batches(job, model, batch), job.task.objective)
    return measured.metrics()


def _my_micro_batches(job: SupervisedJob, model: ShardedModel, batch: Batch) -> tuple[np.ndarray, ...]:
    plan = plan_micro_batches(
        batch.lengths, model.world_size, job.config.learner.micro_batch_tokens, batch.element_sizes
    )
    return plan.micro_batches[model.rank]


def _load(job: SupervisedJob) -> nn.Module:
    config = job.config.learner
    return job.task.load(job.model, "bf16" if config.precision == "bf16" else "fp32", config.attention, job.seed)


def _save(job: SupervisedJob, model: ShardedModel, held_out: Batch) -> None:
    """Write the stage's folder from rank 0."""
    job.task.finish(model, held_out, job.config.learner.micro_batch_tokens)
    model.save_pretrained(getattr(job.folder, job.kind), tokenizer_from=job.model)
