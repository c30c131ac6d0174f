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
from typing import Any, Literal

import numpy as np
import ray
from torch import nn

from rlhf_ray.algorithms.diagnostics import Diagnostics
from rlhf_ray.batch import Batch
from rlhf_ray.config.stages import SupervisedConfig
from rlhf_ray.learner import engine as deepspeed_engine
from rlhf_ray.learner.engine import learning_rate
from rlhf_ray.learner.objectives import Objective, language_objective, preference_objective
from rlhf_ray.learner.planning import plan_micro_batches
from rlhf_ray.learner.sharded_model import ShardedModel
from rlhf_ray.models.heads import SequenceScores, TokenLogprobs
from rlhf_ray.models.loading import load_causal_lm, load_scalar_model
from rlhf_ray.telemetry.metrics import MetricsLog, read_metrics
from rlhf_ray.telemetry.progress import StageProgress
from rlhf_ray.telemetry.run_folder import RunFolder

Kind = Literal["sft", "reward_model"]


@dataclass(frozen=True)
class SupervisedJob:
    """Everything that a rank needs to know, but for the data."""

    kind: Kind
    folder: RunFolder
    model: str
    """Hugging Face folder to start from."""
    config: SupervisedConfig
    centring: float
    seed: int

    @property
    def group(self) -> int:
        """Sequences of one element: 2 for pairs."""
        return 2 if self.kind == "reward_model" else 1

    def steps(self, batch: Batch) -> int:
        """Optimizer steps of the whole stage."""
        return self.config.epochs * math.ceil(len(batch) / self.group / self.config.batch_size)


def run_supervised(job: SupervisedJob, train: Batch, held_out: Batch) -> None:
    """Train on Ray Train, show progress, and leave the model in the stage's folder."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    workers = job.config.learner.workers
    environment = {"OMP_NUM_THREADS": str(workers.threads), "OMP_WAIT_POLICY": "passive", **workers.env}
    if workers.gpus == 0:
        environment["DS_ACCELERATOR"] = "cpu"
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
    objective = language_objective if job.kind == "sft" else preference_objective(job.centring)
    if rank == 0:
        with MetricsLog(job.folder, job.kind) as log:
            _fit(job, model, objective, train, held_out, log)
    else:
        _fit(job, model, objective, train, held_out, None)
    _save(job, model, held_out)


def _fit(
    job: SupervisedJob, model: ShardedModel, objective: Objective, train: Batch, held_out: Batch, log: MetricsLog | None
) -> None:
    """All optimizer steps, with a measurement on held-out data every so many and after the last."""
    total = job.steps(train)
    for step, batch in enumerate(_minibatches(job, train), start=1):
        began = time.perf_counter()
        result = model.step(
            batch,
            _my_micro_batches(job, model, batch),
            objective,
            learning_rate(job.config.learner.optimizer, step - 1, total),
        )
        metrics = dict(result.diagnostics.metrics())
        metrics |= {"grad_norm": result.grad_norm, "learning_rate": result.learning_rate}
        metrics["throughput/tokens_per_s"] = int(batch.lengths.sum()) / (time.perf_counter() - began)
        if step % job.config.evaluate_every == 0 or step == total:
            measured = _measure(job, model, objective, held_out)
            metrics |= {f"heldout/{name}": value for name, value in measured.items()}
        if log is not None:
            log.log(step, metrics)


def _minibatches(job: SupervisedJob, train: Batch) -> Iterator[Batch]:
    """Global minibatches with the weights of their loss: token mean for SFT, mean over pairs for a reward model."""
    elements = len(train) // job.group
    for epoch in range(job.config.epochs):
        order = np.random.default_rng([job.seed, epoch]).permutation(elements)
        for start in range(0, elements, job.config.batch_size):
            chosen = order[start : start + job.config.batch_size]
            yield _weighted(job, train.select((chosen[:, None] * job.group + np.arange(job.group)).reshape(-1)))


def _weighted(job: SupervisedJob, batch: Batch) -> Batch:
    count = int(batch.target_mask.sum())
    return batch.with_columns(weights=np.full(count, job.group / count, dtype=np.float32))


def _measure(job: SupervisedJob, model: ShardedModel, objective: Objective, held_out: Batch) -> dict[str, float]:
    batch = _weighted(job, held_out)
    measured: Diagnostics = model.measure(batch, _my_micro_batches(job, model, batch), objective)
    return measured.metrics()


def _my_micro_batches(job: SupervisedJob, model: ShardedModel, batch: Batch) -> tuple[np.ndarray, ...]:
    plan = plan_micro_batches(batch.lengths, model.world_size, job.config.learner.micro_batch_tokens, job.group)
    return plan.micro_batches[model.rank]


def _load(job: SupervisedJob) -> nn.Module:
    config = job.config.learner
    dtype = "bf16" if config.precision == "bf16" else "fp32"
    if job.kind == "sft":
        return TokenLogprobs(load_causal_lm(job.model, dtype, config.attention))
    return SequenceScores(load_scalar_model(job.model, dtype, config.attention, job.seed))


def _save(job: SupervisedJob, model: ShardedModel, held_out: Batch) -> None:
    """Write the stage's folder from rank 0. A reward model takes along its normalisation on the held-out responses."""
    if job.kind == "reward_model":
        everything = plan_micro_batches(held_out.lengths, 1, job.config.learner.micro_batch_tokens).micro_batches[0]
        scores = model.evaluate(held_out, everything, lambda module, padded: module(padded))
        config = model.engine.module.model.config
        config.reward_mean, config.reward_std = float(scores.mean()), float(max(scores.std(), 1e-6))
    model.save_pretrained(getattr(job.folder, job.kind), tokenizer_from=job.model)
