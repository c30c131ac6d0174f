"""`rlhf-ray`: the console command."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="RLHF on Ray: SFT, reward model, PPO, evaluation. One config file runs on a laptop and on a cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Config = Annotated[Path, typer.Argument(help="YAML config; see configs/", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value", show_default=False)]


@app.callback()
def _root() -> None:
    """Keeps `run` a subcommand while it is the only one."""


@app.command()
def run(
    config: Config,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option(help="Go on with the run of this name")] = False,
    fresh: Annotated[bool, typer.Option(help="Put an older run of this name aside and start again")] = False,
    dry_run: Annotated[bool, typer.Option(help="Print the resolved config and the placement, and stop")] = False,
) -> None:
    """Do all stages of a config: base model → SFT → reward model → PPO → evaluation."""
    from rlhf_ray.config import ConfigError, dump_config, load_config
    from rlhf_ray.stages.summary import print_placement, print_summary

    resolved = load_config(config, overrides or [])
    if dry_run:
        print(dump_config(resolved), end="")
        print_placement(resolved)
        return
    if fresh and resume:
        raise ConfigError("--fresh starts again and --resume goes on; choose one")
    from rlhf_ray.stages.run import run as run_stages
    from rlhf_ray.telemetry.run_folder import RunFolder, put_aside

    if fresh:
        put_aside(RunFolder(f"{resolved.folder}/{resolved.name}"))
    print_summary(run_stages(resolved, resume))


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A run's folder")]) -> None:
    """Write a run's report.html again."""
    from rlhf_ray.telemetry.report import write_report
    from rlhf_ray.telemetry.run_folder import RunFolder, RunFolderError

    if not RunFolder(folder).holds_run:
        raise RunFolderError(f"{folder} is not a run's folder; expected one with a config.yaml")
    print(write_report(RunFolder(folder)))


def main() -> None:
    """Run the command; what the user can mend is said in one line, without a traceback."""
    # People keep their reward functions in the directory they start from; a console script does not look there by itself.
    sys.path.insert(0, os.getcwd())
    try:
        app()
    except _expected_errors() as error:
        print(f"rlhf-ray: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _expected_errors() -> tuple[type[Exception], ...]:
    """What is the input's fault and says so by itself; anything else is a bug and keeps its traceback."""
    from rlhf_ray.config import ConfigError
    from rlhf_ray.data.readers import DataError
    from rlhf_ray.driver.admission import TooManyDrops
    from rlhf_ray.driver.checkpoint import NotACheckpoint
    from rlhf_ray.models.loading import NotAModel
    from rlhf_ray.placement import NotEnoughResources
    from rlhf_ray.rollout.errors import NoWorkerLeft, PromptRefused
    from rlhf_ray.scoring.sources import RewardError
    from rlhf_ray.telemetry.run_folder import RunFolderError

    return (
        ConfigError, DataError, TooManyDrops, NotACheckpoint, NotAModel, NotEnoughResources, NoWorkerLeft, PromptRefused,
        RewardError, RunFolderError, FileNotFoundError,
    )  # fmt: skip
