"""When a PPO run is to call for a person."""

from __future__ import annotations

from pydantic import Field, model_validator

from rlhf_ray.config.section import Section


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
