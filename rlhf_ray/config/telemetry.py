"""Where a run's figures go beside its folder."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlhf_ray.config.section import Section


class WandbConfig(Section):
    """Weights & Biases. The key comes from the environment variable WANDB_API_KEY, and from nowhere else."""

    project: str = Field(min_length=1)
    """Name of the project."""
    entity: str | None = None
    """Who it belongs to; null: the key's default."""
    group: str | None = None
    """What the run's stages are grouped by; null: the run's name."""
    mode: Literal["online", "offline"] = "online"
    """offline: into the run's folder, without key and network; `wandb sync` sends it later."""


class TelemetryConfig(Section):
    """Beside metrics.jsonl, TensorBoard and Prometheus, which are always there."""

    wandb: WandbConfig | None = None
    """Null: nothing goes there."""
