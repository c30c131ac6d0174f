"""PPO's numbers. Sources are the papers and the checklist in `rlhf_ray/README.md`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from rlhf_ray.config.base import Section


class KLConfig(Section):
    """The pull towards the reference policy."""

    placement: Literal["reward", "loss", "none"] = "reward"
    """In the reward of each token (k1; exact with returns to go) or as a term of the loss."""
    estimator: Literal["k2", "k3"] = "k3"
    """For `placement: loss` only; as losses k2 has the gradient of KL(π‖ref), k3 that of KL(ref‖π)."""
    coefficient: float = Field(0.05, ge=0)
    """β, reward per nat."""
    target: float | None = Field(None, gt=0)
    """Sequence KL in nats towards which β adapts (Ziegler et al., arXiv 1909.08593); None: β stays."""
    horizon: int = Field(10_000, ge=1)
    """Episodes over which the adaptive β reacts."""

    @model_validator(mode="after")
    def _target_needs_kl(self) -> KLConfig:
        if self.target is not None and self.placement == "none":
            raise ValueError("kl.target is set but kl.placement is none; choose reward or loss, or drop the target")
        if self.target is not None and self.coefficient == 0:
            raise ValueError(
                "kl.target is set but kl.coefficient is 0, which adapting would never change; start above 0"
            )
        return self


class AlgorithmConfig(Section):
    """How rewards become gradients."""

    advantage: Literal["gae", "grpo", "dr_grpo", "rloo"] = "gae"
    """`gae` trains a value model (PPO); the others compare the samples of one prompt and start none."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount."""
    lam: float = Field(0.95, ge=0, le=1)
    """GAE's λ."""
    whiten_advantages: bool = True
    """Zero mean and unit variance over the valid tokens of the global batch; for `gae` only."""
    whiten_rewards: bool = False
    """Unit variance of the token rewards, mean kept."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    """The ratio is clipped below at 1 − clip_low."""
    clip_high: float = Field(0.2, gt=0)
    """The ratio is clipped above at 1 + clip_high."""
    dual_clip: float | None = Field(None, gt=1)
    """For negative advantages the loss is at most dual_clip·|A|; None: no such bound."""
    clip_value: float = Field(0.2, gt=0)
    """Range of a value's change per update in the value loss."""
    value_coefficient: float = Field(0.1, gt=0)
    """Weight of the value loss (it scales gradients before clipping by norm)."""
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    """How token losses of the global batch become one number."""
    correction: Literal["none", "truncate", "mask"] = "none"
    """What to do where learner and engine disagree on a token's probability: nothing, TIS, or drop the token."""
    correction_bounds: tuple[float, float] = Field((0.5, 2.0), strict=False)
    """Ratio π_learner/π_engine: `truncate` uses the upper bound, `mask` both."""
    missing_eos_penalty: float | None = Field(None, ge=0)
    """Subtracted from the score of a response that hit the token limit."""
    kl: KLConfig = KLConfig()
    """The pull towards the reference."""

    @property
    def needs_value_model(self) -> bool:
        return self.advantage == "gae"

    @field_validator("correction_bounds")
    @classmethod
    def _bounds_in_order(cls, bounds: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= bounds[0] <= 1 <= bounds[1]:
            raise ValueError("correction_bounds must enclose 1, the ratio where engine and learner agree")
        return bounds

    @model_validator(mode="after")
    def _groups_have_no_token_rewards(self) -> AlgorithmConfig:
        if self.advantage != "gae" and self.kl.placement == "reward":
            raise ValueError(f"advantage {self.advantage} compares whole responses; set kl.placement to loss or none")
        return self
