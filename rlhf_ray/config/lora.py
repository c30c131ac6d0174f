"""Low-rank adapters: which matrices a learner trains a small product beside, instead of the matrices themselves."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from rlhf_ray.config.section import Section


class LoraConfig(Section):
    """W stays as it is and alpha/rank · B·A is learned beside it (arXiv 2106.09685); B starts at zero."""

    rank: int = Field(16, ge=1, le=512)
    """Rows of A and columns of B."""
    alpha: float = Field(32.0, gt=0)
    """The product is scaled by alpha / rank."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Linear layers by the ends of their names, such as `q_proj`; `all-linear`: all but the output layer."""
    dropout: float = Field(0.0, ge=0, le=0)
    """None: with it a policy's log-probabilities would not be those of the policy that sampled."""

    @field_validator("target_modules")
    @classmethod
    def _names_some(cls, value: str | list[str]) -> str | list[str]:
        if not value:
            raise ValueError("target_modules is empty; name linear layers such as q_proj, or use all-linear")
        return value
