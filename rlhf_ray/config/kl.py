"""The pull of the policy towards the reference: where, how estimated, how strong."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rlhf_ray.config.section import Section

KLEstimator = Literal["k1", "k2", "k3"]


class KLConfig(Section):
    """The pull towards the reference policy."""

    placement: Literal["reward", "loss", "none"] = "reward"
    """In the reward of each token (k1; exact with returns to go) or as a term of the loss."""
    estimator: KLEstimator | None = None
    """k1, k2 or k3 (Schulman 2020); None: k1 in the reward, k3 in the loss. In the reward only k1 has the gradient of
    KL(π‖ref); in the loss k2 has it, k3 has that of KL(ref‖π), and k1 and k3 have it if `importance_weighted`."""
    importance_weighted: bool = False
    """For `placement: loss`: weigh the estimate by π_θ/π_old, which makes k1 and k3 exact (DeepSeek-V3.2, arXiv 2512.02556)."""
    coefficient: float = Field(0.05, ge=0)
    """β, reward per nat."""
    target: float | None = Field(None, gt=0)
    """Sequence KL in nats towards which β adapts (Ziegler et al., arXiv 1909.08593); None: β stays."""
    horizon: int = Field(10_000, ge=1)
    """Episodes over which the adaptive β reacts."""

    @property
    def used_estimator(self) -> KLEstimator:
        """The estimator that is used where none is named."""
        return self.estimator or ("k1" if self.placement == "reward" else "k3")

    @model_validator(mode="after")
    def _target_needs_kl(self) -> KLConfig:
        if self.target is not None and self.placement == "none":
            raise ValueError("kl.target is set but kl.placement is none; choose reward or loss, or drop the target")
        if self.target is not None and self.coefficient == 0:
            raise ValueError(
                "kl.target is set but kl.coefficient is 0, which adapting would never change; start above 0"
            )
        return self

    @model_validator(mode="after")
    def _estimator_fits_placement(self) -> KLConfig:
        if self.importance_weighted and self.placement != "loss":
            raise ValueError("kl.importance_weighted is for kl.placement loss; a reward is not differentiated")
        if self.placement == "loss" and self.used_estimator == "k1" and not self.importance_weighted:
            raise ValueError(
                "kl.estimator k1 as a loss has an expected gradient of zero; use k2 or k3, set kl.importance_weighted, "
                "or put it in the reward"
            )
        if self.importance_weighted and self.used_estimator == "k2":
            raise ValueError(
                "kl.estimator k2 has the gradient of KL(π‖ref) as it is and would lose it by kl.importance_weighted; "
                "use k1 or k3 with it"
            )
        return self
