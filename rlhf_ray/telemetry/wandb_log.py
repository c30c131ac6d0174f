"""Sends the metrics of a stage to Weights & Biases, under their usual names.

Invariants: only the driver sends, so the key never leaves it; a stage has one W&B run, however often it is resumed, whose id is
kept in the run's folder; a step is sent once, because a step that is repeated after a resume is bit-identical.
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
_NOT_METRICS = ("step", "timestamp")


class WandbUnavailable(InputError, RuntimeError):
    """Weights & Biases is configured but cannot be used."""


def check_wandb(config: WandbConfig | None) -> None:
    """Check before a run starts that Weights & Biases can be used.

    Raises:
        WandbUnavailable: the package or the key is missing.
    """
    if config is None:
        return
    found = importlib.util.find_spec("wandb")
    # A folder named `wandb`, which W&B itself creates, is found as a package without a file.
    if found is None or found.origin is None:
        raise WandbUnavailable(
            "telemetry.wandb is set, but the package wandb is not installed: pip install 'rlhf-ray[wandb]', or set "
            "telemetry.wandb to null"
        )
    if config.mode == "online" and not os.environ.get(KEY):
        raise WandbUnavailable(
            f"telemetry.wandb.mode is online, but {KEY} is not in the environment: set it (rlhf-ray submit passes it on "
            f"with --env {KEY}), or set telemetry.wandb.mode to offline"
        )


class WandbLog(Closeable):
    """Sends the metrics of one stage; does nothing if the config is None."""

    def __init__(self, config: WandbConfig | None, folder: RunFolder, stage: str) -> None:
        self._run: Any = None
        self._last_sent = -1
        if config is None:
            return
        import wandb

        id_file = folder.path / "wandb" / f"{stage}.id"
        id_file.parent.mkdir(parents=True, exist_ok=True)
        if not id_file.is_file():
            atomic_write(id_file, secrets.token_hex(8))
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            group=config.group or folder.name,
            name=f"{folder.name} {stage}",
            id=id_file.read_text(),
            resume="allow",
            mode=config.mode,
            dir=folder.path,
            config=yaml.safe_load(folder.config.read_text()) if folder.config.is_file() else None,
            # Send metrics only: no console output, no code, no state of the repository.
            settings=wandb.Settings(
                console="off", save_code=False, disable_git=True, disable_job_creation=True, quiet=True
            ),
        )
        # Steps that an earlier attempt has sent.
        self._last_sent = self._run.step - 1

    def follow(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Send those records of metrics.jsonl whose steps are new. Null values are left out."""
        if self._run is None:
            return
        for record in records:
            if (step := int(record["step"])) > self._last_sent:
                metrics = {
                    name: value for name, value in record.items() if name not in _NOT_METRICS and value is not None
                }
                self._run.log(metrics, step=step)
                self._last_sent = step

    def close(self) -> None:
        """Wait until everything is sent."""
        if self._run is not None:
            self._run.finish()
            self._run = None
