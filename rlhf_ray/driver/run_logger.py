"""What a run records while it trains: metrics, samples, events, the ledger, alerts and the progress display."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_ray.config.run import RunConfig
from rlhf_ray.driver.checkpointer import TrainingState
from rlhf_ray.driver.training_batch import TrainingBatch
from rlhf_ray.learner.sharded_model import StepResult
from rlhf_ray.roles import busy_phases
from rlhf_ray.rollout.workers import WorkerEvent
from rlhf_ray.runs.events import EventKind, EventLog
from rlhf_ray.runs.ledger import Ledger
from rlhf_ray.runs.metrics import MetricsLog, read_metrics
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.runs.samples import SampleLog
from rlhf_ray.telemetry.alerts import AlertLog
from rlhf_ray.telemetry.progress import StageProgress
from rlhf_ray.telemetry.timing import PhaseTimer
from rlhf_ray.telemetry.wandb_log import WandbLog
from rlhf_ray.types import Experience


def step_metrics(
    state: TrainingState,
    experiences: Sequence[Experience],
    training_batch: TrainingBatch,
    policy: Sequence[StepResult],
    value: Sequence[StepResult],
    times: Mapping[str, float],
) -> dict[str, float | None]:
    """All metrics of a step but those of hooks and services. `state` is the one after the step."""
    totals = np.asarray([e.score.total for e in experiences])
    lengths = np.asarray([e.rollout.sampled_count for e in experiences])
    ages = np.concatenate([state.step - 1 - e.rollout.versions[e.rollout.sampled_mask] for e in experiences])
    tokens = int(training_batch.batch.lengths.sum())
    metrics: dict[str, float | None] = {
        "kl/coefficient": state.kl.beta,
        "response/length_mean": float(lengths.mean()),
        "response/length_max": int(lengths.max()),
        "response/eos_rate": float(np.mean([e.rollout.finish_reason == "stop" for e in experiences])),
        "staleness/mean": float(ages.mean()),
        "staleness/max": int(ages.max()),
        "throughput/samples_per_s": len(experiences) / times["time/step_s"],
        "throughput/tokens_per_s": tokens / times["time/step_s"],
    }
    if experiences[0].score.parts:
        metrics["reward/mean"], metrics["reward/std"] = float(totals.mean()), float(totals.std())
        metrics["reward/shaped_mean"] = training_batch.shaped_reward
    for part in experiences[0].score.parts:
        metrics[f"reward/part/{part}"] = float(np.mean([e.score.parts[part] for e in experiences]))
    if training_batch.teacher_kl is not None:
        metrics["teacher/kl"] = training_batch.teacher_kl
    if experiences[0].rollout.turns:
        metrics["response/turns_mean"] = float(np.mean([len(e.rollout.turns) for e in experiences]))
    if training_batch.kl is not None:
        metrics["kl/sequence"] = training_batch.kl
    if training_batch.batch.old_logprobs is not None:
        differences = np.abs(training_batch.batch.old_logprobs - training_batch.batch.rollout_logprobs)
        metrics["engine/logprob_difference_mean"] = float(differences.mean())
        metrics["engine/logprob_difference_max"] = float(differences.max())
    metrics |= _learner_metrics("policy", policy) | _learner_metrics("value", value)
    if rollout_s := times.get("time/rollout_s"):
        metrics["throughput/rollout_tokens_per_s"] = int(lengths.sum()) / rollout_s
    if update_s := times.get("time/update_s"):
        metrics["throughput/learner_tokens_per_s"] = tokens * len(policy) / update_s
    return {**metrics, **times}


def _learner_metrics(role: str, results: Sequence[StepResult]) -> dict[str, float]:
    """The diagnostics over all optimizer steps of a batch, and the means of loss and gradient norm."""
    if not results:
        return {}
    total = functools.reduce(operator.add, (result.diagnostics for result in results))
    return {
        **total.metrics(),
        f"{role}/loss": float(np.mean([result.loss for result in results])),
        f"{role}/grad_norm": float(np.mean([result.grad_norm for result in results])),
        f"{role}/learning_rate": results[-1].learning_rate,
    }


SAMPLES_PER_STEP = 2
NO_SIGNAL = "no signal: all scores of the group are equal"
_EVENT_KINDS: dict[str, EventKind] = {"started": "join", "stale": "fault", "died": "departure", "redispatched": "fault"}


class RunLogger:
    """Writes a run's files, as a context manager."""

    def __init__(
        self,
        folder: RunFolder,
        events: EventLog,
        tokenizer: PreTrainedTokenizerBase,
        config: RunConfig,
        resume_step: int | None = None,
    ) -> None:
        """`resume_step`: the last step of the run so far, after which everything is removed; None: a new run."""
        self.folder, self.events, self.tokenizer = folder, events, tokenizer
        self.timer = PhaseTimer(busy_phases())
        self.ledger = Ledger(folder.path / "ledger.jsonl", resume_step)
        self._stack = ExitStack()
        self.metrics = self._stack.enter_context(MetricsLog(folder, "ppo", resume_step))
        self.wandb = self._stack.enter_context(WandbLog(config.telemetry.wandb, folder, "ppo"))
        self.alerts = AlertLog(config.alerts, folder, events, read_metrics(folder.metrics))
        self.samples = self._stack.enter_context(SampleLog(folder.samples, resume_step))
        self.progress = StageProgress(folder.name, "ppo", config.ppo.steps, completed=resume_step or 0)

    def __enter__(self) -> RunLogger:
        self._stack.enter_context(self.progress)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def record(
        self,
        state: TrainingState,
        experiences: Sequence[Experience],
        batch: TrainingBatch,
        policy: Sequence[StepResult],
        value: Sequence[StepResult],
        others: Mapping[str, float],
    ) -> dict[str, float]:
        """Record a step, with the metrics of hooks and services in `others`; returns all its metrics that are known."""
        entry = self.ledger.train(state.step, [experience.id for experience in experiences])
        metrics = {**step_metrics(state, experiences, batch, policy, value, self.timer.lap()), **others}
        metrics["sampling/groups_dropped"] = len(entry.dropped)
        record = self.metrics.log(state.step, metrics)
        for experience in experiences[:SAMPLES_PER_STEP]:
            text = self.tokenizer.decode(experience.rollout.token_ids, skip_special_tokens=True)
            self.samples.write(state.step, experience, text)
        self.progress.update(state.step, metrics)
        self.wandb.follow([record])
        for alert in self.alerts.observe(record):
            self.progress.note(f"alert {alert.name} {alert.change} at step {alert.step}: {alert.message}")
        return {name: value for name, value in metrics.items() if value is not None}

    def group_dropped(self, prompt_id: str, reason: str) -> None:
        """Record that a group was dropped because of an error."""
        self.ledger.drop(prompt_id, reason)
        self.events.emit("drop", reason, prompt=prompt_id)

    def group_replaced(self, prompt_id: str) -> None:
        """Record that a group without signal was replaced by another. This is common, so only the ledger has it."""
        self.ledger.drop(prompt_id, NO_SIGNAL)

    def flush(self) -> None:
        """Write the metrics to disk, before a checkpoint that continues after them."""
        self.metrics.sync()

    def checkpoint_saved(self, step: int, path: Path) -> None:
        """Record a checkpoint."""
        self.events.emit("checkpoint", f"step {step}", path=path.name)


def note_worker_event(events: EventLog, event: WorkerEvent) -> None:
    """Record what happened to a rollout worker, except its confirmed weight syncs, of which there is one per step."""
    if event.kind in _EVENT_KINDS:
        events.emit(_EVENT_KINDS[event.kind], event.message, worker=event.worker)
