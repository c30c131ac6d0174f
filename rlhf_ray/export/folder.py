"""Writing the folder of an exported model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

from rlhf_ray.errors import InputError
from rlhf_ray.export.card import model_card
from rlhf_ray.models.loading import check_model_folder
from rlhf_ray.runs.run_folder import QUALITY, RunFolder

What = Literal["policy", "sft", "reward_model"]
LEFT_OUT = ("metrics.jsonl", "fit.json", "held_out_rewards.json")
"""Files of the training stage that are not exported."""


class ExportError(InputError, ValueError):
    """The run has no such model, or the target cannot be written."""


def export(run: RunFolder, what: What, target: Path) -> Path:
    """Copy a run's model, with adapters merged, its model card and its figures; return the folder.

    Raises:
        ExportError: the run has no such model, or the target exists.
    """
    source = {"policy": run.policy, "sft": run.sft, "reward_model": run.reward_model}[what]
    if not run.config.is_file():
        raise ExportError(f"{run.path} is not a run's folder: it has no config.yaml")
    if not source.is_dir():
        there = [name for name in ("policy", "sft", "reward_model") if (run.path / name).is_dir()]
        raise ExportError(f"{run.path} has no {what} yet; it has {', '.join(there) or 'no model'}")
    if target.exists():
        raise ExportError(f"{target} exists already; choose another folder")
    check_model_folder(str(source), f"the {what} to export")
    temporary = target.with_name(f".{target.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary, ignore=shutil.ignore_patterns(*LEFT_OUT))
    model_card(run, what).save(temporary / "README.md")
    figures = run.reward_quality if what == "reward_model" else run.evaluation
    if figures.is_file():
        shutil.copy2(figures, temporary / (QUALITY if what == "reward_model" else figures.name))
    temporary.rename(target)
    return target
