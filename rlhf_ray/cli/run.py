"""`rlhf-ray run` and `rlhf-ray report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlhf_ray.cli.app import Config, Overrides, app


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
