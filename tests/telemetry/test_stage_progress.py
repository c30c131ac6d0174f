"""The display stays below other output; without a terminal there is a plain line every few steps."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys

import pytest
from rich.console import Console

from rlhf_ray.telemetry.progress import StageProgress

FIGURES = {
    "reward/mean": 1.25,
    "kl/sequence": None,
    "response/eos_rate": 0.5,
    "time/step_s": 1.0,
    "time/rollout_s": 0.75,
}


def plain_console() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=40)


def test_plain_lines_come_every_few_steps_and_at_the_end():
    console = plain_console()
    with StageProgress("demo [x]", "reward_model", total=25, completed=5, plain_every=10, console=console) as progress:
        for step in range(6, 26):
            progress.update(step, FIGURES)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "demo [x] · reward model · 25 steps, 5 done before"
    assert [line.split(" · ")[2].split()[0] for line in lines[1:-1]] == ["10/25", "20/25", "25/25"]
    assert all("reward 1.25" in line and "KL" not in line for line in lines[1:])
    assert lines[-1].startswith("✓ reward model  25/25 steps")


def test_failed_stage_says_how_far_it_came_and_lets_the_error_through():
    console = plain_console()
    with pytest.raises(KeyError), StageProgress("demo", "ppo", total=9, console=console) as progress:
        progress.update(4, FIGURES)
        raise KeyError
    assert console.file.getvalue().splitlines()[-1].startswith("✗ ppo  4/9 steps")


WORKER, NOTE = ("(RolloutWorker pid=", ") a line of the worker"), ("weights [v", "] published")
WATCHED = """
import sys
from rlhf_ray.telemetry.progress import StageProgress
with StageProgress("demo", "ppo", total=3) as progress:
    for step in range(1, 4):
        progress.update(step, {"reward/mean": step / 2, "time/step_s": 1.0, "time/rollout_s": 0.75})
        print(f"(RolloutWorker pid={step}) a line of the worker", file=sys.stderr)
        progress.note(f"weights [v{step}] published")
"""


def test_on_a_terminal_it_shows_figures_and_phases_and_keeps_the_lines_of_others_whole():
    reader, writer = pty.openpty()
    environment = {**os.environ, "COLUMNS": "100", "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen([sys.executable, "-c", WATCHED], stdout=writer, stderr=writer, env=environment)
    os.close(writer)
    output = b""
    while chunk := _read(reader):
        output += chunk
    assert process.wait(timeout=30) == 0
    text = output.decode()
    lines = [f"{start}{step}{end}" for step in (1, 2, 3) for start, end in (WORKER, NOTE)]
    assert f"{lines[0]}\r\n" in text
    for line in lines[
        1:
    ]:  # "\x1b[2K" erases the display's line; what others print takes its place, the display goes below
        assert f"\x1b[2K{line}\r\n" in text
    for shown in ("rollout 0.75", "▁", "3/3", "\x1b[?25l"):
        assert shown in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor comes back"


def _read(reader: int) -> bytes:
    try:
        return os.read(reader, 65536)
    except OSError:  # how a pseudo-terminal says that the other side is closed
        return b""
