"""The figures of one PPO step, by their names in `telemetry.names`. Pure."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence

import numpy as np

from rlhf_ray.driver.state import TrainingState
from rlhf_ray.driver.training_batch import Prepared
from rlhf_ray.learner.sharded_model import StepResult
from rlhf_ray.types import Experience


def step_metrics(
    state: TrainingState,
    experiences: Sequence[Experience],
    prepared: Prepared,
    policy: Sequence[StepResult],
    value: Sequence[StepResult],
    times: Mapping[str, float],
) -> dict[str, float | None]:
    """Everything that is logged of a step, `state` being the one after it."""
    totals = np.asarray([e.score.total for e in experiences])
    lengths = np.asarray([e.rollout.chosen_count for e in experiences])
    ages = np.concatenate([state.step - 1 - e.rollout.versions[e.rollout.chosen] for e in experiences])
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
        differences = np.abs(prepared.batch.old_logprobs - prepared.batch.behaviour_logprobs)
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
