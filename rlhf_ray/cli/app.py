"""The typer application, and the arguments and checks that its command modules share."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

import rlhf_ray

TRAIN, JOBS, SERVE, LOOK, CONFIG = "Train", "Cluster jobs", "Serve", "Look", "Data and config"
"""Groups of commands in `rlhf-ray --help`."""

app = typer.Typer(
    help="RLHF on Ray: SFT, reward model, PPO, evaluation. One config file runs on a laptop and on a cluster.",
    epilog="Example: rlhf-ray quickstart",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"rlhf-ray {rlhf_ray.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def command(group: str, example: str, name: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator that adds a command to the application, with its group in `--help` and an example below its own help."""
    options: dict[str, Any] = {"rich_help_panel": group, "epilog": f"Example: {example}"}
    return app.command(name, **options)


def _config(path: str) -> Path:
    """The config file that the user named: a path, `recipe:NAME`, or a URI, of which a local copy is made."""
    from rlhf_ray import recipes
    from rlhf_ray.runs.storage.location import is_uri
    from rlhf_ray.runs.storage.session import fetch_file

    if path.startswith(recipes.PREFIX):
        return recipes.find(path.removeprefix(recipes.PREFIX))
    return fetch_file(path) if is_uri(path) else Path(path)


Config = Annotated[
    Path,
    typer.Argument(help="YAML config, or recipe:NAME for one that comes along", show_default=False, parser=_config),
]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value", show_default=False)]


def check_port(port: int) -> None:
    """Check that a port of this machine is free, before Ray is started for it.

    Raises:
        typer.BadParameter: another program uses the port.
    """
    with socket.socket() as probe:
        # As servers do: closed connections that still linger do not block the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise typer.BadParameter(f"port {port} is not free ({error.strerror}); choose another one") from error
