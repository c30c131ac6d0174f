"""The typer application that every command module adds its commands to, and the arguments that they share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="RLHF on Ray: SFT, reward model, PPO, evaluation. One config file runs on a laptop and on a cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _config(path: str) -> Path:
    """A run on a store has its config there: a copy of it."""
    from rlhf_ray.storage.location import is_uri
    from rlhf_ray.storage.session import read_file

    return read_file(path) if is_uri(path) else Path(path)


Config = Annotated[Path, typer.Argument(help="YAML config; see configs/", show_default=False, parser=_config)]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value", show_default=False)]
