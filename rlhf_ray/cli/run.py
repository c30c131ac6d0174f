"""`rlhf-ray run`, and a command for each of its stages."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf_ray.cli.app import Config, Overrides, app

if TYPE_CHECKING:
    from rlhf_ray.config import RunConfig
    from rlhf_ray.config.run import Stage

Resume = Annotated[bool, typer.Option(help="Go on with the run of this name")]
Fresh = Annotated[bool, typer.Option(help="Put an older run of this name aside and start again")]
DryRun = Annotated[bool, typer.Option(help="Print the resolved config and the placement, and stop")]


@app.command()
def run(
    config: Config, overrides: Overrides = None, resume: Resume = False, fresh: Fresh = False, dry_run: DryRun = False
) -> None:
    """Do all stages of a config: base model → SFT → reward model → PPO → evaluation."""
    from rlhf_ray.config import load_config
    from rlhf_ray.config.changes import as_overrides
    from rlhf_ray.jobs.secrets import received

    sent = received(os.environ)
    os.environ.update(sent.forwarded)
    _do(load_config(config, [*as_overrides(sent.workers), *(overrides or [])]), None, resume, fresh, dry_run)


@app.command()
def sft(config: Config, overrides: Overrides = None, fresh: Fresh = False, dry_run: DryRun = False) -> None:
    """Only the supervised fine-tuning of a config, or the rest of it."""
    _do(_for_stage(config, overrides, "sft"), "sft", False, fresh, dry_run)


@app.command()
def reward_model(config: Config, overrides: Overrides = None, fresh: Fresh = False, dry_run: DryRun = False) -> None:
    """Only the reward model of a config, or the rest of it."""
    _do(_for_stage(config, overrides, "reward_model"), "reward_model", False, fresh, dry_run)


@app.command()
def ppo(config: Config, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Only the reinforcement learning of a config, or the rest of it."""
    _do(_for_stage(config, overrides, "ppo"), "ppo", False, False, dry_run)


@app.command()
def evaluate(config: Config, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Only the comparison of the policies that a config's run has."""
    _do(_for_stage(config, overrides, "evaluation"), "evaluation", False, False, dry_run)


def _for_stage(path: Path, overrides: list[str] | None, stage: Stage) -> RunConfig:
    """The config as it is; one that has not all that a whole run needs, as a run of this stage alone."""
    from rlhf_ray.config import ConfigError, load_config

    try:
        return load_config(path, overrides or [])
    except ConfigError:
        # If the stage is not to blame for it either, its own complaint is the shorter one.
        return load_config(path, [*(overrides or []), f"stages=[{stage}]"])


def _do(config: RunConfig, only: Stage | None, resume: bool, fresh: bool, dry_run: bool) -> None:
    from rlhf_ray.config import ConfigError, dump_config
    from rlhf_ray.stages.summary import print_placement, print_summary

    if dry_run:
        print(dump_config(config), end="")
        print_placement(config)
        return
    if fresh and resume:
        raise ConfigError("--fresh starts again and --resume goes on; choose one")
    from rlhf_ray.runs.run_folder import RunFolder, put_aside
    from rlhf_ray.runs.storage.location import is_uri
    from rlhf_ray.stages.run import run as run_stages

    if fresh:
        if is_uri(config.folder):
            raise ConfigError(
                f"--fresh: {config.folder!r} is on a store, which cannot rename a run; choose another name"
            )
        put_aside(RunFolder(f"{config.folder}/{config.name}"))
    print_summary(run_stages(config, resume, only))
