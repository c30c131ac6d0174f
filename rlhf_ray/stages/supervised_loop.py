"""The training loop of a supervised stage, which every rank runs.

Invariants: an optimizer step uses the same global minibatch for any number of ranks; every rank has the same `FitState`, so all
ranks measure, save and stop at the same steps; a stage that continues from a checkpoint takes the same steps as one that was
never interrupted.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import numpy as np

from rlhf_ray.batch import Batch
from rlhf_ray.learner import deepspeed_engine
from rlhf_ray.learner.deepspeed_engine import learning_rate
from rlhf_ray.learner.sharded_model import ShardedModel
from rlhf_ray.micro_batches import plan_micro_batches
from rlhf_ray.models.loading import Dtype, replace_folder
from rlhf_ray.runs import atomic_checkpoint
from rlhf_ray.runs.atomic_checkpoint import NotACheckpoint
from rlhf_ray.runs.metrics import MetricsLog
from rlhf_ray.stages.supervised_job import FIT, FitState, SupervisedJob

KEPT_CHECKPOINTS = 2


def run_rank(job: SupervisedJob, train: Batch, held_out: Batch, rank: int, world: int) -> int:
    """Load the model, train it, and leave it in the stage's folder; returns the last optimizer step."""
    if (complete := job.result()) is not None:
        return complete.step  # a rank died after the model was in place, and Ray Train restarted all ranks
    config = job.config.learner
    deepspeed_engine.prepare_process(config.workers.threads, config.workers.gpus > 0)
    deepspeed_engine.join_initialised(config.workers.gpus > 0)
    dtype: Dtype = "bf16" if config.precision == "bf16" else "fp32"
    engine = deepspeed_engine.build(
        lambda: job.task.load(job.model, dtype, config.attention, job.seed), config, job.seed
    )
    return SupervisedLoop(job, ShardedModel(engine, config, rank, world), train, held_out).run()


class SupervisedLoop:
    """One rank's part of a stage."""

    def __init__(self, job: SupervisedJob, model: ShardedModel, train: Batch, held_out: Batch) -> None:
        self.job, self.model, self.train = job, model, train
        self.held_out = _weighted(held_out)
        self.total = job.steps(train)
        self.state = FitState()

    def run(self) -> int:
        """Take the remaining steps and save the model, or only a checkpoint if the run is to stop; returns the last step."""
        restored = self.restore()
        with ExitStack() as stack:
            log: MetricsLog | None = None
            if self.model.rank == 0:
                log = stack.enter_context(
                    MetricsLog(self.job.folder, self.job.name, self.state.step if restored else None)
                )
            if not restored:
                self.record(log, 0, self.measure())
            for batch in self.minibatches():
                if self.state.stopped:
                    break
                step = self.state.step + 1
                metrics = self.step(batch)
                if step % self.job.config.evaluate_every == 0 or step == self.total:
                    metrics |= self.measure()
                self.record(log, step, metrics)
                stopping = self.model.any_rank(self.job.stop_file.exists())
                due = stopping or step % self.job.config.checkpoint_every == 0
                if due and step < self.total and not self.state.stopped:
                    self.checkpoint(log)
                    if stopping:
                        return self.state.step
        self.finish()
        return self.state.step

    def minibatches(self) -> Iterator[Batch]:
        """The remaining global minibatches. Each epoch has its own order."""
        elements, size = len(self.train.element_sizes), self.job.config.batch_size
        per_epoch = -(-elements // size)
        for epoch in range(self.state.step // per_epoch, self.job.config.epochs):
            order = np.random.default_rng([self.job.seed, epoch]).permutation(elements)
            done = max(0, self.state.step - epoch * per_epoch)
            for start in range(done * size, elements, size):
                yield _weighted(self.train.select_elements(order[start : start + size]))

    def step(self, batch: Batch) -> dict[str, float]:
        """Take one optimizer step; returns its metrics."""
        began, done = time.perf_counter(), self.state.step
        rate = learning_rate(self.job.config.learner.optimizer, done, self.total)
        result = self.model.step(batch, self.micro_batches(batch), self.job.task.objective, rate)
        self.job.task.observe(result.diagnostics)
        self.state = self.state.after(done + 1)
        seconds = time.perf_counter() - began
        return {
            **result.diagnostics.metrics(),
            "grad_norm": result.grad_norm,
            "learning_rate": rate,
            "epoch": self.job.config.epochs * self.state.step / self.total,
            "throughput/tokens_per_s": int(batch.lengths.sum()) / seconds,
        }

    def measure(self) -> dict[str, float]:
        """Measure the held-out data; save the model if it is the best so far."""
        micro_batches = self.micro_batches(self.held_out)
        metrics = self.model.measure(self.held_out, micro_batches, self.job.task.objective).metrics()
        self.state = self.state.measured(metrics["loss"], self.job.config.early_stopping)
        if self.job.config.keep == "best" and self.state.best_step == self.state.step:
            self.save_model(self.best_folder(self.state))
        return {f"heldout/{name}": value for name, value in metrics.items()}

    def record(self, log: MetricsLog | None, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a step, on rank 0."""
        if log is not None:
            log.log(step, metrics)

    def micro_batches(self, batch: Batch) -> tuple[np.ndarray, ...]:
        """This rank's micro-batches of a minibatch."""
        config = self.job.config.learner
        plan = plan_micro_batches(
            batch.lengths, self.model.world_size, config.micro_batch_tokens, batch.element_sizes, config.packing
        )
        return plan[self.model.rank]

    def save_model(self, folder: Path) -> None:
        """Save the current model and the documents of the task."""
        documents = self.job.task.finish(self.model, self.held_out, self.job.config.learner.micro_batch_tokens)
        self.model.save_pretrained(folder, tokenizer_from=self.job.model)
        if self.model.rank == 0:
            for name, document in documents.items():
                (folder / name).write_text(json.dumps(document, indent=1) + "\n")

    def best_folder(self, state: FitState) -> Path:
        """Where the best model is kept until the stage ends."""
        return self.job.checkpoints / f"best_{state.best_step}"

    def checkpoint(self, log: MetricsLog | None) -> None:
        """Save the learner's, the task's and the loop's state."""
        folder = self.job.checkpoints
        temporary = folder / f"tmp_step_{self.state.step}"
        if self.model.rank == 0:
            atomic_checkpoint.begin(folder, self.state.step)
        self.model.barrier()
        self.model.save_state(str(temporary), {"task": self.job.task.state()})
        self.model.barrier()
        if log is not None:  # rank 0
            log.sync()
            (temporary / FIT).write_text(json.dumps(asdict(self.state)))
            atomic_checkpoint.seal(temporary)
            atomic_checkpoint.keep_newest(folder, KEPT_CHECKPOINTS, up_to=self.state.step)
            self._remove_superseded()

    def restore(self) -> bool:
        """Load the newest checkpoint; returns whether there was one."""
        logger = logging.getLogger(__name__)
        found = atomic_checkpoint.newest(self.job.checkpoints, self._read, logger.warning)
        if found is None:
            return False
        path, self.state = found
        self.job.task.restore(self.model.load_state(str(path))["task"])
        return True

    def finish(self) -> None:
        """Move the chosen model to the stage's folder, and remove the checkpoints."""
        if self.job.config.keep == "last":
            self.save_model(self.best_folder(self.state))
        self.model.barrier()
        if self.model.rank == 0:
            chosen = self.best_folder(self.state)
            (chosen / FIT).write_text(json.dumps(asdict(self.state)))
            shutil.copy2(self.job.folder.stage_metrics(self.job.name), chosen)
            replace_folder(chosen, self.job.model_folder)
            shutil.rmtree(self.job.checkpoints)

    def _read(self, checkpoint: Path) -> FitState:
        atomic_checkpoint.verify(checkpoint, FIT)
        state = FitState(**json.loads((checkpoint / FIT).read_text()))
        if self.job.config.keep == "best" and not self.best_folder(state).is_dir():
            raise NotACheckpoint(f"checkpoint {checkpoint} needs {self.best_folder(state)}, which is missing")
        return state

    def _remove_superseded(self) -> None:
        """Remove the models that are the best one of no kept checkpoint."""
        states = (json.loads(path.read_text()) for path in self.job.checkpoints.glob(f"step_*/{FIT}"))
        named = {f"best_{state['best_step']}" for state in states}
        for folder in self.job.checkpoints.glob("best_*"):
            if folder.name not in named:
                shutil.rmtree(folder)


def _weighted(batch: Batch) -> Batch:
    """Scale the weights to a sum of 1 over the global batch: the loss is a mean over tokens (SFT) or elements (reward model)."""
    assert batch.weights is not None
    return batch.with_columns(weights=batch.weights / batch.weights.sum(dtype=np.float64).astype(np.float32))
