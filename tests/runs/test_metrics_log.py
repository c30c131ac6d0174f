"""Every step is recorded exactly once, as valid JSON, through crashes and resumes; TensorBoard shows the same."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf_ray.runs.metrics import MetricsLog, read_metrics
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.telemetry.names import METRICS, describe, gauge_name


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run")


def record_steps(folder, steps, resume_step=None, value=0.0):
    with MetricsLog(folder, resume_step=resume_step) as log:
        for step in steps:
            log.log(step, {"reward/mean": value + step})


def test_resume_leaves_every_step_once(folder):
    record_steps(folder, range(1, 8))
    record_steps(folder, range(6, 11), resume_step=5, value=100.0)
    records = read_metrics(folder.metrics)
    assert [record["step"] for record in records] == list(range(1, 11))
    assert [record["reward/mean"] for record in records[4:7]] == [5.0, 106.0, 107.0]


def test_torn_last_line_is_skipped_by_readers_and_replaced_on_resume(folder):
    record_steps(folder, [1, 2])
    with open(folder.metrics, "a") as file:
        file.write('{"step": 3, "reward/me')
    assert [record["step"] for record in read_metrics(folder.metrics)] == [1, 2]
    record_steps(folder, [3], resume_step=2)
    assert [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()] == [1, 2, 3]


def test_damage_in_the_middle_is_reported_with_its_line(folder):
    record_steps(folder, [1, 2])
    folder.metrics.write_text("{broken\n" + folder.metrics.read_text())
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1"):
        read_metrics(folder.metrics)


def test_new_log_forgets_the_old_one(folder):
    record_steps(folder, [1, 2, 3])
    record_steps(folder, [1])
    assert [record["step"] for record in read_metrics(folder.metrics)] == [1]


def test_a_step_is_never_recorded_twice_nor_out_of_order(folder):
    with MetricsLog(folder) as log:
        log.log(4, {"loss": 1.0})
        for step in (4, 3):
            with pytest.raises(ValueError, match="step 4"):
                log.log(step, {"loss": 1.0})
    with MetricsLog(folder, resume_step=4) as log, pytest.raises(ValueError, match="step 4"):
        log.log(4, {"loss": 1.0})


def test_figures_that_are_not_finite_become_null_and_the_file_stays_strict_json(folder):
    with MetricsLog(folder) as log:
        figures = {
            "a": math.nan,
            "b": math.inf,
            "c": None,
            "d": np.float32(0.5),
            "e": torch.tensor(2.0),
            "f": np.int64(7),
        }
        log.log(1, figures)

    def refuse(token):
        raise AssertionError(f"{token} is not JSON")

    record = json.loads(folder.metrics.read_text(), parse_constant=refuse)
    assert [record[name] for name in "abcdef"] == [None, None, None, 0.5, 2.0, 7]


@pytest.mark.parametrize("value", ["0.5", torch.ones(2), [1.0]])
def test_values_that_are_not_numbers_are_refused_by_name(folder, value):
    with MetricsLog(folder) as log, pytest.raises(TypeError, match="reward/mean"):
        log.log(1, {"reward/mean": value})
    assert read_metrics(folder.metrics) == []


def test_metric_cannot_take_the_name_of_the_step(folder):
    with MetricsLog(folder) as log, pytest.raises(ValueError, match="'step'"):
        log.log(1, {"step": 3.0})


def test_tensorboard_shows_the_same_and_forgets_what_the_resume_dropped(folder):
    record_steps(folder, range(1, 6))
    record_steps(folder, range(4, 7), resume_step=3, value=100.0)
    events = EventAccumulator(str(folder.tensorboard / "ppo")).Reload()
    shown = [(event.step, event.value) for event in events.Scalars("reward/mean")]
    assert shown == [(record["step"], record["reward/mean"]) for record in read_metrics(folder.metrics)]


def test_stages_have_their_own_files(folder):
    with MetricsLog(folder, stage="sft") as log:
        log.log(1, {"loss": 3.0})
    assert read_metrics(folder.sft / "metrics.jsonl")[0]["loss"] == 3.0
    assert read_metrics(folder.metrics) == []
    assert (folder.tensorboard / "sft").is_dir()


def test_names_in_prometheus_are_valid_and_distinct():
    names = [gauge_name(name) for name in METRICS]
    assert "rlhf_reward_mean" in names
    assert len(set(names)) == len(names)
    assert all(name.replace("_", "").isalnum() for name in names)


def test_families_describe_names_that_the_run_chose():
    assert describe("time/old_logprobs_s").label == "old logprobs"
    assert describe("idle/learner").unit == "%"
    assert describe("my/own").label == "my/own"
