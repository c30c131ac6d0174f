"""The status of a run, from its folder and from a job's log."""

from __future__ import annotations

from contextlib import closing

import pytest

from rlhf_ray.runs.events import EventLog
from rlhf_ray.runs.jsonl import JsonLines, last_record
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.runs.status import RunStatus, newest_status, read_status, status_lines, without_status


def test_a_folder_without_anything_says_only_its_name(tmp_path):
    assert read_status(RunFolder(tmp_path / "a")) == RunStatus("a")


def test_ppo_is_distinguished_from_the_supervised_stage_before_it(tmp_path):
    folder = RunFolder(tmp_path / "a")
    folder.path.mkdir()
    folder.config.write_text("ppo: {steps: 9}\n")
    with closing(JsonLines(folder.stage_metrics("reward_model_2"), None)) as lines:
        lines.append({"step": 4, "loss": 0.5, "throughput/tokens_per_s": 10.0})
    with EventLog(folder.events) as events:
        events.emit("stage", "sft begins")
        events.emit("stage", "sft ends", seconds=1.0)
        events.emit("stage", "reward_model begins")
        events.emit("fault", "a worker died")
        assert read_status(folder) == RunStatus("a", "reward_model", 4, loss=0.5, throughput=10.0, faults=1)
        events.emit("stage", "reward_model ends")
        events.emit("stage", "reward_model took 4 steps; the held-out loss was lowest")
        events.emit("stage", "ppo begins")
        assert read_status(folder) == RunStatus("a", "ppo", steps=9, faults=1)
        with closing(JsonLines(folder.metrics, None)) as lines:
            lines.append({"step": 3, "reward/mean": 1.5, "kl/sequence": 0.25, "throughput/tokens_per_s": None})
        assert read_status(folder) == RunStatus("a", "ppo", 3, 9, reward=1.5, kl=0.25, faults=1)


def test_the_newest_line_of_a_log_wins_and_a_torn_one_does_not_count():
    one, two = RunStatus("a", "ppo", 1), RunStatus("a", "ppo", 2)
    log = ["hello", one.line(), "world", two.line(), "", RunStatus("a", "ppo", 3).line()[:-5]]
    assert newest_status(log) == two
    assert newest_status(["hello"]) is None


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_people_do_not_read_lines_for_programs(size):
    text = f"one\n{RunStatus('a').line()}\ntwo\n\n{RunStatus('b').line()}\nthree"
    chunks = [text[start : start + size] for start in range(0, len(text), size)]
    assert "".join(without_status(chunks)) == "one\ntwo\n\nthree"


def test_a_job_prints_its_status_at_the_latest_at_its_end(tmp_path, capsys):
    folder = RunFolder(tmp_path / "a")
    with status_lines(folder, every_s=60.0):
        with closing(JsonLines(folder.metrics, None)) as lines:
            lines.append({"step": 3})
    assert newest_status(capsys.readouterr().out.splitlines()) == RunStatus("a", step=3)


@pytest.mark.parametrize("block", [1, 16, 1 << 16])
def test_the_last_record_is_found_from_the_end(tmp_path, block):
    path = tmp_path / "a.jsonl"
    assert last_record(path) is None
    path.write_text('{"step": 1, "long": "' + "x" * 50 + '"}\n')
    assert last_record(path, block)["step"] == 1
    with path.open("a") as file:
        file.write('{"step": 2}\n{"step": 3')
    assert last_record(path, block) == {"step": 2}
    path.write_text('{"step": 1')
    assert last_record(path, block) is None
