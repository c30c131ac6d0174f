"""A stage's figures for Weights & Biases, by the names that they have everywhere.

Invariants: only the driver sends, so the key stays with it; a stage has one run there, however often it is resumed, and its id
lies in the run's folder; a step is sent once: one that a resume takes again is the same, bit for bit.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from rlhf_ray.config.telemetry import WandbConfig
from rlhf_ray.errors import InputError
from rlhf_ray.runs.jsonl import Closeable
from rlhf_ray.runs.run_folder import RunFolder, atomic_write

KEY = "WANDB_API_KEY"
_OWN = ("step", "timestamp")


class WandbUnavailable(InputError, RuntimeError):
    """Weights & Biases cannot be used as asked."""


def check_wandb(config: WandbConfig | None) -> None:
    """Before anything starts.

    Raises:
        WandbUnavailable: the package, or the key, is missing.
    """
    if config is None:
        return
    found = importlib.util.find_spec("wandb")
    # A folder `wandb`, which W&B itself leaves behind, looks like a package without a file.
    if found is None or found.origin is None:
        raise WandbUnavailable(
            "telemetry.wandb is set, and the package wandb is not installed: pip install 'rlhf-ray[wandb]', or set "
            "telemetry.wandb to null"
        )
    if config.mode == "online" and not os.environ.get(KEY):
        raise WandbUnavailable(
            f"telemetry.wandb.mode is online, and there is no {KEY} in the environment: set it (rlhf-ray submit takes it "
            f"along with --env {KEY}), or set telemetry.wandb.mode to offline"
        )


class WandbLog(Closeable):
    """One stage; nothing happens where the config is None."""

    def __init__(self, config: WandbConfig | None, folder: RunFolder, stage: str) -> None:
        self._run: Any = None
        self._sent = -1
        if config is None:
            return
        import wandb

        kept = folder.path / "wandb" / f"{stage}.id"
        kept.parent.mkdir(parents=True, exist_ok=True)
        if not kept.is_file():
            atomic_write(kept, secrets.token_hex(8))
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            group=config.group or folder.name,
            name=f"{folder.name} {stage}",
            id=kept.read_text(),
            resume="allow",
            mode=config.mode,
            dir=folder.path,
            config=yaml.safe_load(folder.config.read_text()) if folder.config.is_file() else None,
            # Figures only: neither the console, nor code, nor the state of the repository.
            settings=wandb.Settings(
                console="off", save_code=False, disable_git=True, disable_job_creation=True, quiet=True
            ),
        )
        # What an earlier attempt has sent.
        self._sent = self._run.step - 1

    def follow(self, records: Iterable[Mapping[str, float | int | None]]) -> None:
        """Send the records of steps that are new. Null figures are left out."""
        if self._run is None:
            return
        for record in records:
            if (step := int(record["step"])) > self._sent:
                figures = {name: value for name, value in record.items() if name not in _OWN and value is not None}
                self._run.log(figures, step=step)
                self._sent = step

    def close(self) -> None:
        """Wait until everything is sent."""
        if self._run is not None:
            self._run.finish()
            self._run = None
