"""A teacher: a larger local model whose distribution the policy is drawn to, on the policy's own responses."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rlhf_ray.config.learner import LearnerConfig
from rlhf_ray.config.reward import ScorerConfig
from rlhf_ray.config.section import Section, Workers, micro_batch_budget


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


class ReplayConfig(Section):
    """Samples of older policies, which keep the discriminator from forgetting what it has told apart before."""

    share: float = Field(0.5, gt=0, lt=1)
    """Of the samples that an optimizer step sees; the rest are the batch's own."""
    batches: int = Field(4, ge=1)
    """The samples of the newest so many batches are kept, in the driver's memory and in checkpoints."""

    def per_pass(self, batch_size: int) -> int:
        """Old samples beside the `batch_size` new ones."""
        return round(batch_size * self.share / (1 - self.share))

    @model_validator(mode="after")
    def _enough_to_draw_from(self) -> ReplayConfig:
        old = self.share / (1 - self.share)
        if old > self.batches:
            raise ValueError(
                f"share {self.share:g} asks for {old:.3g} old samples to each new one, and {self.batches} batches of them are "
                "kept; raise batches or lower share"
            )
        return self


class DiscriminatorConfig(LearnerConfig):
    """A classifier of `data.demonstrations` and the policy's samples (GAIL, arXiv 1606.03476); what it finds missing in a sample
    is a source of reward, log D − log(1 − D) (AIRL, arXiv 1710.11248)."""

    model: str | None = None
    """Folder (or hub name) that it starts from, with the policy's tokenizer; None: the one that the policy starts from."""
    weight: float = Field(1.0, gt=0)
    """Factor of its part of the reward, `discriminator`, in the total."""
    clip: float = Field(5.0, gt=0)
    """The part is within ± this many nats."""
    smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Demonstrations have the label 1 − smoothing (one-sided, arXiv 1606.03498), which bounds how sure it can be of them, and
    lowers all its scores: what is as likely in both has log((1 − smoothing) / (1 + smoothing)) instead of 0."""
    epochs: int = Field(1, ge=1)
    """Passes over each batch's samples."""
    minibatches: int = Field(4, ge=1)
    """Optimizer steps of one pass; divides `ppo.batch_size`."""
    replay: ReplayConfig | None = ReplayConfig()
    """Old samples beside the new ones; null: none."""
    trusted_accuracy: float = Field(0.6, ge=0, lt=1)
    """A batch on which its accuracy is below this it does not reward (where nothing else does, the policy waits). A coin has
    0.5; 0: it always rewards."""
    sufficient_accuracy: float = Field(0.8, gt=0.5, le=1)
    """While its accuracy is above this, and it is as sure as that warrants, it does not learn, lest it is never wrong and its
    reward the same everywhere. 1: it always learns."""

    @model_validator(mode="after")
    def _bounds_in_order(self) -> DiscriminatorConfig:
        if self.trusted_accuracy >= self.sufficient_accuracy:
            raise ValueError(
                f"trusted_accuracy {self.trusted_accuracy:g} must be below sufficient_accuracy {self.sufficient_accuracy:g}, "
                "or a discriminator that is not believed would not learn either"
            )
        return self

    @model_validator(mode="after")
    def _trains_all_weights(self) -> DiscriminatorConfig:
        if self.lora is not None:
            raise ValueError("lora: adapters are for the policy; the discriminator trains all weights, remove it")
        return self
