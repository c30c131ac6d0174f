"""What a run writes down while it trains: metrics, samples, events, the ledger, checkpoints."""

from __future__ import annotations

import asyncio
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_ray.config.telemetry import AlertsConfig, WandbConfig
from rlhf_ray.driver import checkpointer
from rlhf_ray.driver.checkpointer import TrainingState
from rlhf_ray.driver.extras.discriminator import Discriminator
from rlhf_ray.driver.training_batch import TrainingBatch
from rlhf_ray.driver.workers import Roles
from rlhf_ray.learner.sharded_model import StepResult
from rlhf_ray.rollout.pool import WorkerEvent
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
    prepared: TrainingBatch,
    policy: Sequence[StepResult],
    value: Sequence[StepResult],
    times: Mapping[str, float],
) -> dict[str, float | None]:
    """Everything that is logged of a step, `state` being the one after it."""
    totals = np.asarray([e.score.total for e in experiences])
    lengths = np.asarray([e.rollout.sampled_count for e in experiences])
    ages = np.concatenate([state.step - 1 - e.rollout.versions[e.rollout.sampled_mask] for e in experiences])
    tokens = int(prepared.batch.lengths.sum())
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
        metrics["reward/shaped_mean"] = prepared.shaped_reward
    for part in experiences[0].score.parts:
        metrics[f"reward/part/{part}"] = float(np.mean([e.score.parts[part] for e in experiences]))
    if prepared.teacher_kl is not None:
        metrics["teacher/kl"] = prepared.teacher_kl
    if experiences[0].rollout.turns:
        metrics["response/turns_mean"] = float(np.mean([len(e.rollout.turns) for e in experiences]))
    if prepared.kl is not None:
        metrics["kl/sequence"] = prepared.kl
    if prepared.batch.old_logprobs is not None:
        differences = np.abs(prepared.batch.old_logprobs - prepared.batch.rollout_logprobs)
        metrics["engine/logprob_difference_mean"] = float(differences.mean())
        metrics["engine/logprob_difference_max"] = float(differences.max())
    metrics |= _learner_metrics("policy", policy) | _learner_metrics("value", value)
    if rollout_s := times.get("time/rollout_s"):
        metrics["throughput/rollout_tokens_per_s"] = int(lengths.sum()) / rollout_s
    if update_s := times.get("time/update_s"):
        metrics["throughput/learner_tokens_per_s"] = tokens * len(policy) / update_s
    return metrics | times


def _learner_metrics(role: str, results: Sequence[StepResult]) -> dict[str, float]:
    """Diagnostics over all optimizer steps of the batch; loss and gradient norm as their means."""
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
_BUSY = {
    "rollout": ("rollout",),
    "scoring": ("scoring",),
    "learner": ("preparation", "update", "publication", "discriminator"),
}
_EVENT_KINDS: dict[str, EventKind] = {"started": "join", "stale": "fault", "died": "departure", "redispatched": "fault"}


class RunLogger:
    """Opened at step `resume_step` (None: a new run); everything after that step is removed. A context manager."""

    def __init__(
        self,
        folder: RunFolder,
        events: EventLog,
        tokenizer: PreTrainedTokenizerBase,
        steps: int,
        keep: int,
        config_sha256: str,
        resume_step: int | None = None,
        alerts: AlertsConfig | None = None,
        wandb: WandbConfig | None = None,
        push: Callable[[], None] | None = None,
    ) -> None:
        """`alerts`: when to call for a person; None: by the defaults. `wandb`: where to send the metrics, too. `push`: takes a
        checkpoint to a store, and returns when it is there."""
        self.folder, self.events, self.tokenizer = folder, events, tokenizer
        self.keep, self.config_sha256, self.push = keep, config_sha256, push
        self.timer = PhaseTimer(_BUSY)
        self.ledger = Ledger(folder.path / "ledger.jsonl", resume_step)
        self._stack = ExitStack()
        self.metrics = self._stack.enter_context(MetricsLog(folder, "ppo", resume_step))
        self.wandb = self._stack.enter_context(WandbLog(wandb, folder, "ppo"))
        self.alerts = AlertLog(alerts or AlertsConfig(), folder, events, read_metrics(folder.metrics))
        self.samples = self._stack.enter_context(SampleLog(folder.samples, resume_step))
        self.progress = StageProgress(folder.name, "ppo", steps, completed=resume_step or 0)

    def __enter__(self) -> RunLogger:
        self._stack.enter_context(self.progress)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)

    def record(
        self,
        state: TrainingState,
        experiences: Sequence[Experience],
        prepared: TrainingBatch,
        policy: Sequence[StepResult],
        value: Sequence[StepResult],
        beside: Mapping[str, float],
    ) -> None:
        """A step was applied. `beside`: metrics of judges and the like, and of the discriminator."""
        entry = self.ledger.train(state.step, [experience.id for experience in experiences])
        metrics = step_metrics(state, experiences, prepared, policy, value, self.timer.lap()) | beside
        metrics["sampling/groups_dropped"] = len(entry.dropped)
        record = self.metrics.log(state.step, metrics)
        for experience in experiences[:SAMPLES_PER_STEP]:
            text = self.tokenizer.decode(experience.rollout.token_ids, skip_special_tokens=True)
            self.samples.write(state.step, experience, text)
        self.progress.update(state.step, metrics)
        self.wandb.follow([record])
        for alert in self.alerts.observe(record):
            self.progress.note(f"alert {alert.name} {alert.change} at step {alert.step}: {alert.message}")

    def dropped(self, prompt_id: str, reason: str) -> None:
        """A group was given up."""
        self.ledger.drop(prompt_id, reason)
        self.events.emit("drop", reason, prompt=prompt_id)

    def resampled(self, prompt_id: str) -> None:
        """A group without signal was replaced by another; common, so in the ledger only."""
        self.ledger.drop(prompt_id, NO_SIGNAL)

    async def checkpoint(self, state: TrainingState, roles: Roles, imitation: Discriminator | None = None) -> Path:
        """Write a checkpoint of everything that the run needs to go on."""
        self.metrics.sync()

        async def write_roles(folder: Path) -> None:
            await roles.policy.save_checkpoint(folder / "policy_learner")
            await roles.policy.save_pretrained(folder / "policy")
            if roles.value is not None:
                await roles.value.save_checkpoint(folder / "value_learner")
            if imitation is not None:
                await imitation.save(folder)

        path = await checkpointer.save(self.folder.checkpoints, state.saved(self.config_sha256), write_roles, self.keep)
        self.events.emit("checkpoint", f"step {state.step}", path=path.name)
        if self.push is not None:
            await asyncio.to_thread(self.push)
        return path


def note_worker_event(events: EventLog, event: WorkerEvent) -> None:
    """Write down what happened to a rollout worker. Confirmed publications are the rule and stay out: one per step."""
    if event.kind in _EVENT_KINDS:
        events.emit(_EVENT_KINDS[event.kind], event.message, worker=event.worker)
