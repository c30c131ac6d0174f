"""`rlhf-ray run`, a command for each of its stages, and `rlhf-ray quickstart`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf_ray.cli.app import TRAIN, Config, Overrides, command

if TYPE_CHECKING:
    from rlhf_ray.config import RunConfig
    from rlhf_ray.config.run import Stage

Resume = Annotated[bool, typer.Option(help="Continue the run of this name")]
Fresh = Annotated[bool, typer.Option(help="Rename an older run of this name and start again")]
DryRun = Annotated[bool, typer.Option(help="Print the resolved config and the placement, start nothing")]


@command(TRAIN, "rlhf-ray quickstart --fresh")
def quickstart(
    overrides: Overrides = None, resume: Resume = False, fresh: Fresh = False, dry_run: DryRun = False
) -> None:
    """Train a small model with RLHF on simulated data, in runs/quickstart. Needs no file, download or GPU."""
    from rlhf_ray import recipes
    from rlhf_ray.config import load_config

    _do(load_config(recipes.find("quickstart"), overrides or []), None, resume, fresh, dry_run)


@command(TRAIN, "rlhf-ray run config.yaml ppo.steps=200 --resume")
def run(
    config: Config, overrides: Overrides = None, resume: Resume = False, fresh: Fresh = False, dry_run: DryRun = False
) -> None:
    """Run all stages of a config: base model → SFT → reward model → PPO → evaluation."""
    from rlhf_ray.config import load_config
    from rlhf_ray.config.changes import as_overrides
    from rlhf_ray.jobs.secrets import received

    sent = received(os.environ)
    os.environ.update(sent.forwarded)
    _do(load_config(config, [*as_overrides(sent.workers), *(overrides or [])]), None, resume, fresh, dry_run)


@command(TRAIN, "rlhf-ray sft config.yaml sft.epochs=3")
def sft(config: Config, overrides: Overrides = None, fresh: Fresh = False, dry_run: DryRun = False) -> None:
    """Run only the supervised fine-tuning of a config, or what is left of it."""
    _do(_for_stage(config, overrides, "sft"), "sft", False, fresh, dry_run)


@command(TRAIN, "rlhf-ray reward-model config.yaml reward_model.epochs=2")
def reward_model(config: Config, overrides: Overrides = None, fresh: Fresh = False, dry_run: DryRun = False) -> None:
    """Train only the reward model of a config, or continue it."""
    _do(_for_stage(config, overrides, "reward_model"), "reward_model", False, fresh, dry_run)


@command(TRAIN, "rlhf-ray ppo config.yaml ppo.steps=200")
def ppo(config: Config, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Run only the reinforcement learning of a config, or continue it."""
    _do(_for_stage(config, overrides, "ppo"), "ppo", False, False, dry_run)


@command(TRAIN, "rlhf-ray evaluate config.yaml")
def evaluate(config: Config, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Compare the policies that a config's run has trained."""
    _do(_for_stage(config, overrides, "evaluation"), "evaluation", False, False, dry_run)


def _for_stage(path: Path, overrides: list[str] | None, stage: Stage) -> RunConfig:
    """The config as it is; if it lacks what a whole run needs, as a run of this stage alone."""
    from rlhf_ray.config import ConfigError, load_config

    try:
        return load_config(path, overrides or [])
    except ConfigError:
        # If the config is not enough for this stage either, the error of this stage alone is the shorter one.
        return load_config(path, [*(overrides or []), f"stages=[{stage}]"])


def _do(config: RunConfig, only: Stage | None, resume: bool, fresh: bool, dry_run: bool) -> None:
    from rlhf_ray.config import dump_config
    from rlhf_ray.stages.summary import print_placement, print_summary

    if dry_run:
        print(dump_config(config), end="")
        print_placement(config)
        return
    from rlhf_ray.api import run as run_stages

    print_summary(run_stages(config, resume=resume, fresh=fresh, only=only).folder)
