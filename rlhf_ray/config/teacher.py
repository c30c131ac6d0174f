"""A teacher: a larger local model whose distribution the policy is drawn to, on the policy's own responses."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rlhf_ray.config.resources import Workers, micro_batch_budget
from rlhf_ray.config.reward import ScorerConfig


class TeacherConfig(ScorerConfig):
    """On-policy distillation, beside a reward or instead of it."""

    model: str
    """A Hugging Face folder (or a hub name) with the policy's tokenizer."""
    coefficient: float = Field(1.0, gt=0)
    """Weight of the distillation, per nat; a reward's advantages are added as they are."""
    mode: Literal["advantage", "full_vocabulary"] = "advantage"
    """`advantage`: log π_T − log π_old of each sampled token is (a part of) its advantage; a few bytes per token, the teacher
    in actors of its own. `full_vocabulary`: the exact KL(π_θ‖π_T) of each token's distribution in the loss, which has no
    sampling noise; every rank of the policy's learner holds the teacher, frozen (its share of it with ZeRO stage 3)."""

    @model_validator(mode="after")
    def _actors_of_the_mode(self) -> TeacherConfig:
        own = (self.workers, self.micro_batch_tokens)
        if self.mode == "full_vocabulary" and own != (Workers(cpus=0.125), micro_batch_budget({})):
            raise ValueError(
                "mode full_vocabulary runs the teacher in the policy's learner, with its micro-batches: workers and "
                "micro_batch_tokens are for mode advantage"
            )
        return self
