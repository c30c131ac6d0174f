"""The typer application that every command module adds its commands to, and the arguments that they share."""

from __future__ import annotations

import socket
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
    from rlhf_ray.runs.storage.location import is_uri
    from rlhf_ray.runs.storage.session import fetch_file

    return fetch_file(path) if is_uri(path) else Path(path)


Config = Annotated[Path, typer.Argument(help="YAML config; see configs/", show_default=False, parser=_config)]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value", show_default=False)]


def check_port(port: int) -> None:
    """Refuse a port of this machine that another program has, before Ray starts for it.

    Raises:
        typer.BadParameter: it is taken.
    """
    with socket.socket() as probe:
        # As servers do: connections of a program that has ended do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise typer.BadParameter(f"port {port} is not free ({error.strerror}); choose another one") from error
