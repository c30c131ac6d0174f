"""Metrics outside the run folder, and alerts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rlhf_ray.config.section import Section


class WandbConfig(Section):
    """Weights & Biases. The key is read from the environment variable WANDB_API_KEY only."""

    project: str = Field(min_length=1)
    """Name of the project."""
    entity: str | None = None
    """User or team that owns the project; null: the default of the key."""
    group: str | None = None
    """Group of the run's stages; null: the name of the run."""
    mode: Literal["online", "offline"] = "online"
    """online: send while training. offline: write to the run's folder, without key and network; `wandb sync` sends it
    later."""


class TelemetryConfig(Section):
    """Metrics outside the run folder, in addition to metrics.jsonl, TensorBoard and Prometheus, which are always written."""

    wandb: WandbConfig | None = None
    """Send metrics to Weights & Biases; null: do not."""


class AlertsConfig(Section):
    """Limits that are checked after each PPO step. null switches an alert off."""

    kl: float | None = Field(50.0, gt=0)
    """KL from the reference policy, in nats per response, above which an alert is raised."""
    entropy: float | None = Field(0.2, gt=0, lt=1)
    """Share of the initial entropy below which the policy counts as collapsed."""
    eos_rate_drop: float | None = Field(0.2, gt=0, le=1)
    """Alert if the share of responses that end with EOS falls by more than this below its best value."""
    length_growth: float | None = Field(1.0, gt=0)
    """Growth of the mean response length over `window` that makes a growing reward suspect. 1 means twice as long."""
    throughput: float | None = Field(0.25, gt=0, lt=1)
    """Share of the median throughput (tokens per second over `window`) below which an alert is raised."""
    not_finite: bool = True
    """Alert if a reward, loss, KL, entropy or gradient is NaN or infinite."""
    window: int = Field(50, ge=10)
    """Steps over which trends are fitted. They are checked from the 10th step on."""
    first_steps: int = Field(5, ge=1)
    """Steps whose mean is the initial value of a metric. Entropy and the EOS rate are compared as means over as many
    steps."""
    patience: int = Field(3, ge=1)
    """A condition must hold for this many steps in a row before an alert is raised, and must not hold for as many before it
    ends."""

    @model_validator(mode="after")
    def _window_holds_first_steps(self) -> AlertsConfig:
        if self.first_steps > self.window:
            raise ValueError(
                f"alerts.first_steps {self.first_steps} is above alerts.window {self.window}; raise the window"
            )
        return self
