"""The metrics of a step, from parts with known values."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from rlhf_ray.algorithms.diagnostics import PolicyDiagnostics, ValueDiagnostics
from rlhf_ray.algorithms.statistics import summarise
from rlhf_ray.config.algorithm import KLConfig
from rlhf_ray.driver.checkpointer import TrainingState
from rlhf_ray.driver.run_logger import step_metrics
from rlhf_ray.driver.training_batch import TrainingBatch, collate
from rlhf_ray.learner.sharded_model import StepResult
from rlhf_ray.telemetry.names import METRICS, describe
from rlhf_ray.types import Score

TIMES = {"time/step_s": 2.0, "time/rollout_s": 0.5, "time/update_s": 0.25, "idle/learner": 0.8}


def summary(*values: float):
    column = torch.tensor(values)
    return summarise(column, torch.ones_like(column, dtype=torch.bool))


def policy_step(loss: float, *ratios: float) -> StepResult:
    return StepResult(
        loss, 2 * loss, 1e-3, PolicyDiagnostics(summary(*ratios), summary(0.0), summary(0.1), summary(2.0))
    )


def value_step(loss: float) -> StepResult:
    values = summary(1.0, 3.0)
    return StepResult(loss, loss, 2e-3, ValueDiagnostics(values, values, summary(0.0, 0.0), summary(0.0)))


@pytest.fixture
def metrics(experience) -> dict[str, float]:
    """Three responses, the state after step 5; the last response is one version old at its first token."""
    experiences = [
        experience(f"p{i}", 0, length, score) for i, (length, score) in enumerate(((2, 1.0), (4, 2.0), (6, 6.0)))
    ]
    experiences[1] = replace(experiences[1], rollout=replace(experiences[1].rollout, finish_reason="length"))
    experiences[2] = replace(experiences[2], score=Score(6.0, {"model": 12.0}))
    for index, versions in enumerate(([4] * 2, [4] * 4, [3] + [4] * 5)):
        rollout = replace(experiences[index].rollout, versions=np.asarray(versions, dtype=np.int32))
        experiences[index] = replace(experiences[index], rollout=rollout)
    batch = collate(experiences)
    shift = np.zeros(12, dtype=np.float32)
    shift[3] = -0.6
    batch = batch.with_columns(old_logprobs=batch.rollout_logprobs + shift)
    prepared = TrainingBatch(batch, kl=1.5, shaped_reward=2.5, trained=np.ones(3, dtype=bool))
    state = TrainingState(5, 20, TrainingState.initial(KLConfig(coefficient=0.2)).kl)
    policy = [policy_step(1.0, 1.0, 3.0), policy_step(3.0, 2.0)]
    return step_metrics(state, experiences, prepared, policy, [value_step(0.5)], TIMES)


def test_values(metrics):
    expected = {
        "reward/mean": 3.0, "reward/shaped_mean": 2.5, "reward/part/model": 5.0, "kl/coefficient": 0.2, "kl/sequence": 1.5,
        "response/length_mean": 4.0, "response/length_max": 6, "response/eos_rate": 2 / 3,
        "staleness/mean": 1 / 12, "staleness/max": 1,
        "engine/logprob_difference_mean": 0.05, "engine/logprob_difference_max": 0.6,
        "policy/loss": 2.0, "policy/grad_norm": 4.0, "policy/learning_rate": 1e-3, "policy/ratio_mean": 2.0,
        "policy/ratio_max": 3.0, "value/loss": 0.5, "value/mean": 2.0, "value/explained_variance": 1.0,
        "throughput/samples_per_s": 1.5, "throughput/tokens_per_s": (12 + 3 * 4) / 2.0,
        "throughput/rollout_tokens_per_s": 24.0, "throughput/learner_tokens_per_s": 24 * 2 / 0.25,
    }  # fmt: skip
    assert {name: metrics[name] for name in expected} == {
        name: pytest.approx(v, abs=1e-5) for name, v in expected.items()
    }
    assert metrics["reward/std"] == pytest.approx(np.std([1.0, 2.0, 6.0]))


def test_every_name_is_in_the_catalogue(metrics):
    unknown = [
        name for name in metrics if name not in METRICS and not describe(name).unit and "reward/part" not in name
    ]
    assert not unknown
