"""The supervised stages, SFT and the reward model: length, early stopping, checkpoints and losses."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from rlhf_ray.config.learner import LearnerConfig
from rlhf_ray.config.section import Section


class EarlyStoppingConfig(Section):
    """Ends a stage that no longer improves on held-out data."""

    patience: int = Field(3, ge=1)
    """Measurements in a row without improvement after which the stage ends."""
    min_improvement: float = Field(0.0, ge=0)
    """An improvement is a held-out loss that is lower than the best one by more than this, in nats."""


class SupervisedConfig(Section):
    """A supervised stage (SFT or reward model) on Ray Train with DeepSpeed."""

    epochs: int = Field(1, ge=1)
    """Passes over the data."""
    batch_size: int = Field(64, ge=1)
    """Dialogues (SFT) or labels (reward model) per optimizer step, over all ranks."""
    learner: LearnerConfig = LearnerConfig()
    """Ranks, precision, sharding and optimizer."""
    evaluate_every: int = Field(50, ge=1)
    """Optimizer steps between measurements on held-out data. One is also made before the first and after the last step."""
    early_stopping: EarlyStoppingConfig | None = None
    """When to end before the last epoch; null: never."""
    keep: Literal["best", "last"] = "best"
    """Which model is kept: the one with the lowest held-out loss, or the one after the last step."""
    checkpoint_every: int = Field(500, ge=1)
    """Optimizer steps between checkpoints, from which an interrupted stage continues. They are removed when the stage is
    complete."""
    max_failures: int = Field(2, ge=0)
    """How often dead workers are restarted from the newest checkpoint before the stage fails."""


class GroupsConfig(Section):
    """Learns a reward r_0 + δ_g for each annotator group g."""

    minimum_labels: int = Field(200, ge=1)
    """A group with fewer training labels gets no δ. Its labels train r_0 only."""
    shrinkage: float = Field(0.05, ge=0)
    """Coefficient of δ_g² per label, so that what the groups have in common goes to r_0."""


class ReliabilityConfig(Section):
    """Learns η_k, the probability that a label of annotator k is meant (Crowd-BT, WSDM 2013), by online EM."""

    prior: float = Field(0.9, gt=0.5, lt=1)
    """η of an annotator without labels. It must be above ½, or better and worse could not be distinguished."""
    strength: float = Field(20.0, gt=0)
    """Number of labels that the prior counts as."""
    memory: float = Field(500.0, gt=0)
    """After this many further labels of an annotator an old label counts 1/e, because an earlier reward model produced its
    estimate."""


class RewardModelConfig(SupervisedConfig):
    """Trains a reward model on human feedback."""

    kind: Literal["pairs", "rankings", "scores"] = "pairs"
    """Type of feedback in `data`. pairs: choices between two responses, and edits, whose edited response is the better one.
    rankings: orders of several responses. scores: ratings."""
    centring: float = Field(0.01, ge=0)
    """Coefficient of (r_1 + r_2)² over compared responses, which keeps rewards around zero (arXiv 2312.09244)."""
    margin: float = Field(1.0, ge=0)
    """Kind pairs: units of reward per unit of the label's margin, for labels that have one (Llama 2, arXiv 2307.09288). 0:
    margins are ignored."""
    ranking_loss: Literal["all_pairs", "plackett_luce", "choice"] = "all_pairs"
    """Kind rankings: the mean over all pairs (InstructGPT), the likelihood of the whole order, or the likelihood of the best
    response only."""
    aspects: dict[str, float] = {"overall": 1.0}
    """Kind scores: the aspects to learn and the factor of each in the reward. Ratings are standardised per aspect first."""
    members: int = Field(1, ge=1, le=16)
    """Reward models in the ensemble. They train one after the other on the same labels, with another order and another fresh
    head. Their folders are `reward_model`, `reward_model_2`, …; `ppo.reward.model.combine` says how they make one reward."""
    groups: GroupsConfig | None = None
    """Learn what annotator groups disagree on; null: one reward for all."""
    reliability: ReliabilityConfig | None = None
    """Kind pairs: learn how reliable each annotator is; null: all labels count equally."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Sections of `data` that hold this kind of feedback. One of them is enough."""
        return ("pairs", "edits") if self.kind == "pairs" else (self.kind,)

    @field_validator("aspects")
    @classmethod
    def _some_reward(cls, aspects: dict[str, float]) -> dict[str, float]:
        if not any(aspects.values()):
            raise ValueError(f"at least one aspect must have a factor other than 0; got {aspects}")
        return aspects

    @model_validator(mode="after")
    def _all_weights(self) -> RewardModelConfig:
        if self.learner.lora is not None:
            raise ValueError(
                "learner.lora: adapters are for language models; a reward model trains all weights: remove it"
            )
        return self

    @model_validator(mode="after")
    def _settings_of_the_kind(self) -> RewardModelConfig:
        if self.reliability is not None and self.kind != "pairs":
            raise ValueError(f"reliability needs kind pairs, and kind is {self.kind}: remove it, or use kind pairs")
        for name, kind in (("margin", "pairs"), ("ranking_loss", "rankings"), ("aspects", "scores")):
            if self.kind != kind and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is used by kind {kind} only, and kind is {self.kind}: remove it")
        return self
