"""Alerts of a run: events, the console's line, status, report; and no second time on resume."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from rlhf_ray.config import parse_config
from rlhf_ray.config.algorithm import KLConfig
from rlhf_ray.driver.checkpointer import TrainingState
from rlhf_ray.driver.run_logger import RunLogger
from rlhf_ray.driver.training_batch import TrainingBatch, collate
from rlhf_ray.models.loading import load_tokenizer
from rlhf_ray.report import write_report
from rlhf_ray.runs.events import EventLog, read_events
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.runs.status import read_status
from rlhf_ray.telemetry.alerts import raised_alerts

CONFIG = parse_config(
    {
        "name": "run", "stages": ["ppo"], "model": {"path": "model"}, "data": {"prompts": {"location": "prompts.jsonl"}},
        "ppo": {"steps": 20, "reward": {"model": {"path": "reward"}}}, "alerts": {"kl": 4.0, "patience": 2},
    }
)  # fmt: skip


@contextmanager
def logger(folder: RunFolder, tokenizer, resume_step: int | None = None) -> Iterator[RunLogger]:
    with (
        EventLog(folder.events) as events,
        RunLogger(folder, events, tokenizer, CONFIG, resume_step) as opened,
    ):
        yield opened


def test_an_alert_reaches_everybody_who_looks(tmp_path, experience, tiny_model, capsys):
    folder, tokenizer = RunFolder(tmp_path / "run"), load_tokenizer(tiny_model)
    experiences = [experience(f"p{at}", 0, 3 + at, float(at)) for at in range(4)]
    prepared = TrainingBatch(collate(experiences), kl=1.0, shaped_reward=0.5, trained=np.ones(4, dtype=bool))
    state = TrainingState.initial(KLConfig())

    def record(opened: RunLogger, step: int, kl: float) -> None:
        opened.record(replace(state, step=step), experiences, replace(prepared, kl=kl), [], [], {})

    with logger(folder, tokenizer) as opened:
        for step, kl in enumerate((1.0, 5.0, 6.0, 7.0), start=1):
            record(opened, step, kl)
    said = "the KL to the reference is 6 nats per response, above alerts.kl = 4, since step 2"
    (event,) = [event for event in read_events(folder.events) if event.kind == "alert"]
    assert event.message.startswith(said) and event.fields == {"alert": "kl_high", "change": "begins", "step": 3}
    assert capsys.readouterr().out.count(f"alert kl_high begins at step 3: {said}") == 1
    assert read_status(folder).alerts == 1
    page = write_report(folder).read_text()
    assert 'id="alerts"' in page and page.index('id="alerts"') < page.index('id="ppo"') and said in page
    with logger(folder, tokenizer, resume_step=4) as opened:
        for step, kl in enumerate((7.0, 1.0, 1.0), start=5):
            record(opened, step, kl)
    (alert,) = raised_alerts(read_events(folder.events))
    assert (alert.step, alert.ended_at) == (3, 7), "not fired again by the resume, and over once"
    assert read_status(folder).alerts == 0
    assert "is over" in write_report(folder).read_text()


@pytest.mark.parametrize("reward", [np.nan, np.inf])
def test_a_reward_that_is_not_finite_is_told_in_the_step_that_has_it(tmp_path, experience, tiny_model, reward):
    folder, tokenizer = RunFolder(tmp_path / "run"), load_tokenizer(tiny_model)
    experiences = [experience("p", 0, 3, reward), experience("q", 0, 3, 0.0)]
    prepared = TrainingBatch(collate(experiences), kl=1.0, shaped_reward=0.5, trained=np.ones(2, dtype=bool))
    with logger(folder, tokenizer) as opened:
        opened.record(replace(TrainingState.initial(KLConfig()), step=1), experiences, prepared, [], [], {})
    (event,) = [event for event in read_events(folder.events) if event.kind == "alert"]
    assert event.message.startswith("reward/mean: not finite, since step 1")
