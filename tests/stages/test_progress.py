"""How the driver follows a supervised stage by the metrics file that rank 0 writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_ray.config.supervised import SupervisedConfig
from rlhf_ray.runs import tail
from rlhf_ray.runs.metrics import MetricsLog
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.stages.sft import LanguageTask
from rlhf_ray.stages.supervised import _MetricsFollower
from rlhf_ray.stages.supervised_job import SupervisedJob


class Shown:
    """Stands in for the progress display and for Weights & Biases."""

    def __init__(self) -> None:
        self.step, self.updates, self.sent = 0, [], []

    def update(self, step: int, figures: dict) -> None:
        self.step = step
        self.updates.append((step, figures.get("loss"), figures.get("heldout/loss")))

    def follow(self, records: list) -> None:
        self.sent += [record["step"] for record in records]


@pytest.fixture
def job(tmp_path: Path) -> SupervisedJob:
    return SupervisedJob("sft", RunFolder(tmp_path / "run"), "model", SupervisedConfig(), LanguageTask(), seed=0)


def test_it_shows_the_newest_step_and_reads_every_line_once(job, monkeypatch):
    parsed = []
    parse = tail.parse_line
    monkeypatch.setattr(tail, "parse_line", lambda line, *where: parsed.append(line) or parse(line, *where))
    shown = Shown()
    follower = _MetricsFollower(job, shown, shown)
    follower.show_new()
    assert shown.updates == []
    with MetricsLog(job.folder, "sft") as log:
        log.log(0, {"heldout/loss": 3.0})
        follower.show_new()
        for step in range(1, 4):
            log.log(step, {"loss": 3.0 - step})
            follower.show_new()
        log.log(4, {"loss": -1.0, "heldout/loss": 1.0})
        log.log(5, {"loss": -2.0})
        follower.show_new()
        follower.show_new()
    assert shown.updates == [(0, None, 3.0), (1, 2.0, None), (2, 1.0, None), (3, 0.0, None), (5, -2.0, 1.0)]
    assert shown.sent == list(range(6)) and len(parsed) == 6


def test_repeated_steps_of_a_restarted_rank_do_not_move_the_progress_back(job):
    shown = Shown()
    follower = _MetricsFollower(job, shown, shown)
    with MetricsLog(job.folder, "sft") as log:
        for step in range(4):
            log.log(step, {"loss": float(step)})
    follower.show_new()
    with MetricsLog(job.folder, "sft", resume_step=1) as log:
        log.log(2, {"loss": 2.0})
        follower.show_new()
        log.log(3, {"loss": 3.0})
        log.log(4, {"loss": 4.0})
        follower.show_new()
    assert [step for step, *_ in shown.updates] == [3, 4]
