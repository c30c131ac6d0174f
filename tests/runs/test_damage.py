"""If a file of a run is damaged, or a page cannot be written, the console prints one message and no traceback."""

from __future__ import annotations

import json
import sys
from functools import partial

import pytest

from rlhf_ray.cli import main
from rlhf_ray.errors import InputError
from rlhf_ray.runs.events import EventLog
from rlhf_ray.runs.jsonl import DamagedLine
from rlhf_ray.runs.metrics import MetricsLog, read_metrics
from rlhf_ray.runs.run_folder import RunFolder

STEP = {"step": 1, "timestamp": 1.7e9, "reward/mean": 0.5}
EVENT = {"time": 1.7e9, "kind": "fault", "message": "a worker died", "fields": {}}
NO_EVENTS = {
    "no 'fields', which every event has": {"time": 1.0, "kind": "fault", "message": "x"},
    "time is 'noon'; a number is expected": EVENT | {"time": "noon"},
    "message is None; a string is expected": EVENT | {"message": None},
    "fields is []; an object is expected": EVENT | {"fields": []},
    "no 'step' in its fields, which every alert has": EVENT
    | {"kind": "alert", "fields": {"alert": "x", "change": "begins"}},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.config.write_text("name: run\n")
    folder.metrics.write_text(json.dumps(STEP) + "\n")
    folder.events.write_text(json.dumps(EVENT) + "\n")
    return folder


@pytest.fixture
def refused(monkeypatch, capsys):
    """Runs a command that must fail and returns its message."""

    def refused(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["rlhf-ray", *arguments])
        monkeypatch.setattr(sys, "path", [*sys.path])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2 and isinstance(ended.value.__cause__, InputError)
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith("rlhf-ray: ")
        return said.err

    return refused


def add(path, *lines):
    with open(path, "a") as file:
        file.writelines(f"{line}\n" for line in lines)


@pytest.mark.parametrize("command", ["report", "status"])
@pytest.mark.parametrize("file", ["metrics", "events"])
def test_a_bad_line_is_named_with_what_to_do(folder, refused, command, file):
    path = getattr(folder, file)
    add(path, "nonsense")
    said = refused(command, str(folder.path))
    line = "last complete line" if (command, file) == ("status", "metrics") else "line 2"
    assert f"{path}, {line}: not JSON" in said and "Restore or remove the line" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("command", ["report", "status"])
@pytest.mark.parametrize("wrong", NO_EVENTS)
def test_a_line_that_is_no_event_is_named(folder, refused, command, wrong):
    add(folder.events, json.dumps(NO_EVENTS[wrong]))
    said = refused(command, str(folder.path))
    assert f"{folder.events}, line 2: {wrong}" in said and "Restore or remove the line" in said


def test_a_figure_that_is_no_number_is_named(folder, refused):
    add(folder.metrics, json.dumps(STEP | {"reward/mean": "high"}))
    assert f"{folder.metrics}, last complete line: reward/mean is 'high'" in refused("status", str(folder.path))
    assert f"{folder.metrics}, line 2: reward/mean is 'high'" in refused("report", str(folder.path))


def test_all_bad_lines_of_a_run_are_reported_together(folder, refused):
    add(folder.metrics, "nonsense", "[1]")
    add(folder.events, "{}")
    said = refused("report", str(folder.path)).splitlines()
    assert [place in line for place, line in zip(("line 2", "line 3", "events.jsonl"), said, strict=True)] == [True] * 3


def test_everything_that_opens_a_damaged_log_reports_the_same(folder):
    """A resumed run opens both; `serve` reads the step that it serves from the metrics."""
    add(folder.events, "nonsense")
    add(folder.metrics, "nonsense")
    resumed = partial(MetricsLog, resume_step=1)
    for opened, place in ((EventLog, folder.events), (read_metrics, folder.metrics), (resumed, folder)):
        with pytest.raises(DamagedLine, match="line 2: not JSON") as caught:
            opened(place)
        assert isinstance(caught.value, InputError) and isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "empty"),
        ("- 1\n", "list where a mapping is expected"),
        ("a: [\n", "not YAML"),
        ("ppo: 3\n", "a number in ppo.steps"),
        ("ppo: {steps: many}\n", "a number in ppo.steps"),
        ("stages: 3\n", "a list in stages"),
    ],
)
def test_a_damaged_config_is_named_with_what_to_do(folder, refused, text, wrong):
    folder.config.write_text(text)
    said = refused("status", str(folder.path))
    assert f"{folder.config} is damaged" in said and wrong in said and "Restore it from a copy" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("runs", [1, 2])
@pytest.mark.parametrize(
    ("output", "wrong"),
    [("kept", "is a folder"), ("nowhere/page.html", "there is no folder"), ("file/page.html", "there is no folder")],
)
def test_a_page_without_a_place_is_refused_before_anything_is_read(folder, refused, tmp_path, runs, output, wrong):
    (tmp_path / "kept").mkdir()
    (tmp_path / "file").write_text("")
    folder.metrics.write_text("nonsense\n")
    before = sorted(tmp_path.rglob("*"))
    said = refused("report", *["run", "other"][:runs], "--output", output)
    assert str(tmp_path / output) in said and wrong in said and "--output" in said
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_in_the_place_of_the_report_itself_is_named(folder, refused):
    folder.report.mkdir()
    assert f"{folder.report} is a folder" in refused("report", str(folder.path))
