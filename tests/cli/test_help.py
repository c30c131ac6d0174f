"""The command line itself: help, version, completion, and how little it imports."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import rlhf_ray
from rlhf_ray.cli import app
from rlhf_ray.cli.app import CONFIG, JOBS, LOOK, SERVE, TRAIN

SLOW = ("torch", "ray", "vllm", "transformers", "deepspeed", "numpy", "httpx", "yaml")
"""Packages that `--help` must not import."""


def commands(group: Any = None, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with its full name."""
    for name, command in (group or typer.main.get_command(app)).commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*prefix, name))
        else:
            yield (*prefix, name), command


ALL = dict(commands())


def run_alone(*arguments: str, **environment: str) -> tuple[str, set[str]]:
    """What the command prints in a process of its own, and the packages that it imports."""
    code = (
        "import sys\n"
        "from rlhf_ray.cli import main\n"
        f"sys.argv = ['rlhf-ray', *{list(arguments)!r}]\n"
        "try:\n    main()\n"
        "finally:\n"
        "    print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)\n"
    )
    command, variables = [sys.executable, "-c", code], os.environ | environment
    result = subprocess.run(command, capture_output=True, text=True, env=variables, check=True)
    return result.stdout, set(result.stderr.split())


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"]], ids=" ".join)
def test_help_and_version_import_nothing_slow(arguments):
    printed, imported = run_alone(*arguments)
    assert printed and "rlhf_ray" in imported and not imported & set(SLOW)


def test_completion_works_and_imports_nothing_slow():
    words = {"_RLHF_RAY_COMPLETE": "complete_bash", "COMP_WORDS": "rlhf-ray qui", "COMP_CWORD": "1"}
    printed, imported = run_alone(**words)
    assert printed.split() == ["quickstart"] and "rlhf_ray" in imported and not imported & set(SLOW)


def test_the_version_is_the_packages():
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0 and result.output == f"rlhf-ray {rlhf_ray.__version__}\n"


def test_commands_are_listed_in_groups():
    result = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "120"})
    titles = [line.split("─ ")[1].split(" ─")[0] for line in result.output.splitlines() if line.startswith("╭─")]
    assert titles == ["Options", TRAIN, JOBS, LOOK, SERVE, CONFIG]


@pytest.mark.parametrize("name", ALL, ids=" ".join)
def test_every_command_has_an_example_that_parses(name):
    command = ALL[name]
    assert command.help and command.epilog
    program, *words = shlex.split(command.epilog.removeprefix("Example: "))
    assert program == "rlhf-ray" and tuple(words[: len(name)]) == name
    command.make_context(" ".join(name), words[len(name) :])
