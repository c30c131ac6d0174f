"""`rlhf-ray init`: ask for a model, data and a reward, and write a config."""

from __future__ import annotations

import json
import re
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from rlhf_ray.cli.app import CONFIG, command

SCHEMA = "rlhf-ray.schema.json"
"""File name of the JSON schema that is written next to a config."""
_QUESTIONS = {
    "model": ("Model: a Hugging Face folder, or tiny", "tiny"),
    "data": (
        "Data: files of demonstrations, preference pairs or prompts, separated by spaces; or simulate",
        "simulate",
    ),
    "reward": ("Reward: model (trained on your pairs), a function as module:name, or both", "model"),
}


@command(CONFIG, "rlhf-ray init my-run --model models/base --data pairs.jsonl --reward model")
def init(
    target: Annotated[
        Path, typer.Argument(help="Folder for config.yaml, or the YAML file itself", show_default=False)
    ] = Path("."),
    model: Annotated[str | None, typer.Option(help="A Hugging Face folder, or tiny", show_default=False)] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="JSONL, CSV or Parquet file, or simulate; repeatable", show_default=False),
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(help="model, or a function as module:name; repeat it for both", show_default=False),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run; default: the folder's or file's")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask; use defaults for what is not given")] = False,
    schema: Annotated[bool, typer.Option(help=f"Also write {SCHEMA}, for completion in editors")] = True,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file")] = False,
) -> None:
    """Write a small commented config. Asks for a model, data and a reward, unless they are given as options."""
    from rlhf_ray.cli.starter import Answers, starter_config
    from rlhf_ray.config import load_config

    path = target if target.suffix in (".yaml", ".yml") else target / "config.yaml"
    if path.exists() and not force:
        raise typer.BadParameter(f"{path} exists already; choose another name, or overwrite it with --force")
    answers = Answers(
        name or _run_name(path),
        model or _ask("model", yes),
        tuple(data or _ask("data", yes).split()),
        tuple(reward or _ask("reward", yes).split()),
    )
    text = starter_config(answers, SCHEMA if schema else None)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    try:
        draft.write_text(text, encoding="utf-8")
        load_config(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    if schema:
        from rlhf_ray.config.reference import config_schema

        (path.parent / SCHEMA).write_text(json.dumps(config_schema(), indent=1) + "\n", encoding="utf-8")
    print(f"wrote    {path}")
    print(f"check    rlhf-ray run {quote(str(path))} --dry-run")
    print(f"train    rlhf-ray run {quote(str(path))}")


def _ask(what: str, yes: bool) -> str:
    question, default = _QUESTIONS[what]
    return default if yes else typer.prompt(question, default=default)


def _run_name(path: Path) -> str:
    """The file's name, or its folder's if the file is called config; without characters that a run's name cannot have."""
    stem = path.absolute().parent.name if path.stem == "config" else path.stem
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._") or "my-run"
