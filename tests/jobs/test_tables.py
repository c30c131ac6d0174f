"""Tables of runs for the console."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console
from rich.table import Table

from rlhf_ray.jobs.cluster import Attempt, Workers
from rlhf_ray.jobs.submission import Submission
from rlhf_ray.jobs.tables import run_table, status_cells, status_table
from rlhf_ray.runs.status import RunStatus

SUBMISSION = Submission("a", 1, "/shared/runs/a", "exec python", (), {})


def text(table: Table) -> str:
    console = Console(width=160)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def test_a_row_shows_all_known_values():
    status = RunStatus("a", "reward_model", 3, 20, reward=0.1234, kl=1.5, throughput=12345.6, faults=2, alerts=1)
    workers = Workers({"rollout": 2, "learner": 3}, 2)
    row = status_cells(Attempt(SUBMISSION, "RUNNING"), status, workers)
    assert row == (
        "a", "[green]running[/]", "reward model", "3/20", "0.123", "1.5", "–", "12,346",
        "3 learner, 2 rollout on 2 nodes", "[red]1[/]", "[red]2[/]",
    )  # fmt: skip


def test_an_unknown_value_is_a_dash():
    assert status_cells(None, RunStatus("a"), None) == ("a", *"––––––––", "0", "0")
    assert "a" in text(status_table([(None, RunStatus("a"), None)]))


def test_a_run_is_listed_once_with_its_last_attempt():
    first = Attempt(SUBMISSION, "STOPPED", 1000.0, 1090.0)
    second = Attempt(replace(SUBMISSION, attempt=2), "RUNNING", 2000.0)
    lines = text(run_table([first, second], now=2185.0)).splitlines()
    assert len(lines) == 2
    assert lines[1].split()[:3] == ["a", "running", "2"] and "3m05s" in lines[1] and "/shared/runs/a" in lines[1]
