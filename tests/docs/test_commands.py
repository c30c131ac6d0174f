"""What the documentation tells people to type: run where that takes seconds, parsed where it does not."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import click
import pytest
import typer
from typer.testing import CliRunner

from rlhf_ray.cli import app
from rlhf_ray.runs.run_folder import RunFolder
from tests.docs.commands import BEFORE, DOCUMENTS, NOT_RUN, ROOT, RUN, documented, fences, inline

PAIR = {"prompt": "Where is order 4711?", "chosen": "It will arrive on Monday.", "rejected": "I do not know."}


@pytest.fixture
def workplace(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the recipes, made-up runs, and data."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "configs", "configs")
    for name in ("quickstart", "seed1", "seed2", "a", "b", "one", "two"):
        run = RunFolder(tmp_path / "runs" / name)
        run.path.mkdir(parents=True)
        run.config.write_text(
            f"name: {name}\nstages: [sft, ppo]\nmodel: {{path: base}}\ndata: {{demonstrations: {{location: demos.jsonl}}}}\n"
        )
        run.metrics.write_text(
            "".join(json.dumps({"step": step, "reward/mean": step / 3}) + "\n" for step in (1, 2, 3))
        )
    shutil.copytree(tiny_model, RunFolder("runs/quickstart").policy)
    for name in ("my_pairs.jsonl", "pairs.jsonl", "test.jsonl"):
        Path(name).write_text(json.dumps(PAIR) + "\n")
    return tmp_path


def test_every_block_names_its_language():
    nameless = [(document.name, body) for document in DOCUMENTS for language, body in fences(document) if not language]
    assert not nameless, "a fenced block without a language: sh, console, text, yaml or python"


def test_every_command_is_in_a_table():
    known = {command for command in documented() if command.startswith("make ")} | RUN.keys() | NOT_RUN.keys()
    new = {command: name for command, name in documented().items() if command not in known}
    assert not new, "add these to RUN or NOT_RUN in tests/docs/commands.py"
    assert not (RUN.keys() | NOT_RUN.keys()) - documented().keys(), "no document shows these any more"
    assert not RUN.keys() & NOT_RUN.keys()


@pytest.mark.parametrize("command", RUN)
def test_it_runs(command, workplace, tiny_model):
    for needed in (BEFORE.get(command), command):
        if needed is None:
            continue
        words = shlex.split(needed.replace("/models/my-base", str(tiny_model)).replace("/where/you", str(workplace)))
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, f"{result.output}{result.exception!r}"
        assert RUN[needed] in result.output


@pytest.mark.parametrize("command", [command for command in NOT_RUN if re.match("rlhf-ray [a-z]", command)])
def test_it_would_be_understood(command):
    parse(shlex.split(command)[1:])


def test_commands_in_running_text_exist():
    for command, document in inline().items():
        words = [word for word in command.split()[1:] if word.isascii()]
        assert resolve(words), f"{document}: {command}"


@pytest.mark.parametrize("command", [command for command in documented() if command.startswith("make ")])
def test_make_has_the_target(command):
    result = subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def resolve(words: list[str]) -> tuple[click.Command, list[str]] | None:
    """The command that the words name, and the rest of them."""
    command, rest = typer.main.get_command(app), list(words)
    while isinstance(command, click.Group):
        if not rest or rest[0] not in command.commands:
            return None
        command, rest = command.commands[rest[0]], rest[1:]
    return command, rest


def parse(words: list[str]) -> None:
    """Fail as `rlhf-ray` would for an unknown command or option, and do nothing else."""
    resolved = resolve(words)
    assert resolved, words
    command, rest = resolved
    command.make_context(command.name, rest)
