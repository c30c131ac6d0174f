"""Where a run's figures go beside its folder."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

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


class AlertsConfig(Section):
    """Limits of what is watched in each PPO step. Null switches an alert off."""

    kl: float | None = Field(50.0, gt=0)
    """Nats per response: the policy is further than this from the reference."""
    entropy: float | None = Field(0.2, gt=0, lt=1)
    """Share of the entropy of the first steps, below which the policy has collapsed."""
    eos_rate_drop: float | None = Field(0.2, gt=0, le=1)
    """Share of responses, less than at its best, that the policy still ends itself."""
    length_growth: float | None = Field(1.0, gt=0)
    """Growth of the mean response length over `window`, 1 being twice as long, that makes a growing reward suspect."""
    throughput: float | None = Field(0.25, gt=0, lt=1)
    """Share of the median of tokens per second over `window`, below which something is wrong with the machines."""
    not_finite: bool = True
    """Rewards, losses, KL, entropies and gradients that are NaN or infinite."""
    window: int = Field(50, ge=10)
    """Steps over which trends are fitted; they are judged from the 10th step on."""
    first_steps: int = Field(5, ge=1)
    """Steps whose mean is where a run began; entropy and the EOS rate are compared as means over as many."""
    patience: int = Field(3, ge=1)
    """Steps in a row for which something must hold before an alert begins, and must not hold before it is over."""

    @model_validator(mode="after")
    def _window_holds_first_steps(self) -> AlertsConfig:
        if self.first_steps > self.window:
            raise ValueError(
                f"alerts.first_steps {self.first_steps} is above alerts.window {self.window}; raise the window"
            )
        return self
