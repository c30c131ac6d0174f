"""What the policy learns from besides rewards: a teacher, a larger local model; and a discriminator of demonstrations."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rlhf_ray.config.learner import LearnerConfig
from rlhf_ray.config.reward import ScorerConfig
from rlhf_ray.config.section import Section, Workers, micro_batch_budget


class TeacherConfig(ScorerConfig):
    """On-policy distillation, in addition to a reward or instead of it."""

    model: str
    """A Hugging Face folder or a hub name. The teacher must have the policy's tokenizer."""
    coefficient: float = Field(1.0, gt=0)
    """Weight of the distillation, per nat. It does not scale the advantages of the reward."""
    mode: Literal["advantage", "full_vocabulary"] = "advantage"
    """advantage: log π_T − log π_old of each sampled token is added to its advantage. This takes a few bytes per token, and
    the teacher has its own actors. full_vocabulary: the exact KL(π_θ‖π_T) of each token's distribution is added to the loss,
    without sampling noise. Every rank of the policy's learner holds the frozen teacher, or its shard with ZeRO stage 3."""

    @model_validator(mode="after")
    def _actors_of_the_mode(self) -> TeacherConfig:
        own = (self.workers, self.micro_batch_tokens)
        if self.mode == "full_vocabulary" and own != (Workers(cpus=0.125), micro_batch_budget({})):
            raise ValueError(
                "mode full_vocabulary runs the teacher in the policy's learner, with its micro-batches: remove workers and "
                "micro_batch_tokens, which are for mode advantage"
            )
        return self


class ReplayConfig(Section):
    """Samples of older policies, which keep the discriminator from forgetting what it has learned."""

    share: float = Field(0.5, gt=0, lt=1)
    """Share of old samples among the policy samples of an optimizer step. The rest are from the current batch."""
    batches: int = Field(4, ge=1)
    """Samples of this many newest batches are kept, in the driver's memory and in checkpoints."""

    def per_pass(self, batch_size: int) -> int:
        """Number of old samples for `batch_size` new ones."""
        return round(batch_size * self.share / (1 - self.share))

    @model_validator(mode="after")
    def _enough_to_draw_from(self) -> ReplayConfig:
        old = self.share / (1 - self.share)
        if old > self.batches:
            raise ValueError(
                f"share {self.share:g} needs {old:.3g} old samples for each new one, but only {self.batches} batches of them are "
                "kept; raise batches or lower share"
            )
        return self


class DiscriminatorConfig(LearnerConfig):
    """A classifier that tells `data.demonstrations` from the policy's samples (GAIL, arXiv 1606.03476). Its reward is log D
    − log(1 − D) (AIRL, arXiv 1710.11248)."""

    model: str | None = None
    """Folder or hub name of the initial model, which must have the policy's tokenizer; null: the policy's initial model."""
    weight: float = Field(1.0, gt=0)
    """Factor of the part `discriminator` in the total reward."""
    clip: float = Field(5.0, gt=0)
    """The discriminator's reward is clipped to ± this many nats."""
    smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Demonstrations have the label 1 − smoothing (one-sided label smoothing, arXiv 1606.03498). This bounds the logits and
    lowers all rewards: a response that is as likely in both sets gets log((1 − smoothing) / (1 + smoothing)) instead of
    0."""
    epochs: int = Field(1, ge=1)
    """Passes over the samples of each batch."""
    minibatches: int = Field(4, ge=1)
    """Optimizer steps per pass. It must divide `ppo.batch_size`."""
    replay: ReplayConfig | None = ReplayConfig()
    """Old samples in addition to the new ones; null: none."""
    trusted_accuracy: float = Field(0.6, ge=0, lt=1)
    """If the accuracy on a batch is below this, the batch gets no reward from the discriminator. The policy skips its update
    if there is no other reward. Chance is 0.5. 0: always use the reward."""
    sufficient_accuracy: float = Field(0.8, gt=0.5, le=1)
    """The discriminator skips its update while its accuracy is above this and its loss is as low as this accuracy warrants.
    Otherwise it could become always right, and its reward would be the same everywhere. 1: always update."""

    @model_validator(mode="after")
    def _bounds_in_order(self) -> DiscriminatorConfig:
        if self.trusted_accuracy >= self.sufficient_accuracy:
            raise ValueError(
                f"trusted_accuracy {self.trusted_accuracy:g} must be below sufficient_accuracy {self.sufficient_accuracy:g}, "
                "otherwise a discriminator that is not trusted would not learn either"
            )
        return self

    @model_validator(mode="after")
    def _trains_all_weights(self) -> DiscriminatorConfig:
        if self.lora is not None:
            raise ValueError("lora: adapters are for the policy; the discriminator trains all weights, remove it")
        return self
