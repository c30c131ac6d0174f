"""The supervised stages: how long they train, when they stop, what they keep."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from rlhf_ray.config.learner import LearnerConfig
from rlhf_ray.config.section import Section


class EarlyStoppingConfig(Section):
    """End a stage that gets no better on held-out data."""

    patience: int = Field(3, ge=1)
    """Measurements in a row without improvement after which it ends."""
    min_improvement: float = Field(0.0, ge=0)
    """What counts as one: the held-out loss falls below the best by more than this, nats."""


class SupervisedConfig(Section):
    """A supervised stage (SFT or reward model) on Ray Train with DeepSpeed."""

    epochs: int = Field(1, ge=1)
    """Passes over the data."""
    batch_size: int = Field(64, ge=1)
    """Dialogues (or labels) of one optimizer step, over all ranks."""
    learner: LearnerConfig = LearnerConfig()
    """Ranks, precision, sharding, optimizer."""
    evaluate_every: int = Field(50, ge=1)
    """Optimizer steps between measurements on held-out data; there is one before the first step and one after the last."""
    early_stopping: EarlyStoppingConfig | None = None
    """When to end before the last epoch; null: never."""
    keep: Literal["best", "last"] = "best"
    """The model that stays: the one with the lowest held-out loss measured, or the one after the last step."""
    checkpoint_every: int = Field(500, ge=1)
    """Optimizer steps between checkpoints, from which an interrupted stage goes on; they are removed when it is complete."""
    max_failures: int = Field(2, ge=0)
    """How often workers that died are started again, from the newest checkpoint, before the stage fails."""


class GroupsConfig(Section):
    """A reward r_0 + δ_g for each annotator group g."""

    minimum_labels: int = Field(200, ge=1)
    """A group with fewer training labels gets no δ of its own: its labels teach r_0 only."""
    shrinkage: float = Field(0.05, ge=0)
    """Coefficient of δ_g², per label: what groups have in common goes to r_0."""


class ReliabilityConfig(Section):
    """η_k, how often annotator k means what they say (Crowd-BT, WSDM 2013), by online EM."""

    prior: float = Field(0.9, gt=0.5, lt=1)
    """η of somebody of whom nothing is known; above ½, or nobody could tell right from wrong."""
    strength: float = Field(20.0, gt=0)
    """Labels that the prior counts as."""
    memory: float = Field(500.0, gt=0)
    """Labels of one annotator after which an older one counts 1/e: it was judged by a worse reward model."""


class RewardModelConfig(SupervisedConfig):
    """Learning a reward from what people said of responses."""

    kind: Literal["pairs", "rankings", "scores"] = "pairs"
    """What `data` holds: choices between two (and edits: the edited is better), orders of several, or marks."""
    centring: float = Field(0.01, ge=0)
    """Coefficient of (r_1 + r_2)², over compared responses, which keeps rewards around zero (arXiv 2312.09244)."""
    margin: float = Field(1.0, ge=0)
    """Pairs: units of reward per unit of the label's margin, where it has one (Llama 2, arXiv 2307.09288); 0: not read."""
    ranking_loss: Literal["all_pairs", "plackett_luce", "choice"] = "all_pairs"
    """Rankings: mean over all pairs (InstructGPT), the likelihood of the whole order, or of the best one only."""
    aspects: dict[str, float] = {"overall": 1.0}
    """Scores: the aspects to learn, and the factor of each in the reward; marks are standardised per aspect first."""
    members: int = Field(1, ge=1, le=16)
    """Reward models of an ensemble: the same labels in another order, with another fresh head, one after the other. The
    folders are `reward_model`, `reward_model_2`, …; `ppo.reward.model.combine` makes one reward of them."""
    groups: GroupsConfig | None = None
    """Learn what annotator groups disagree on; null: one reward for all."""
    reliability: ReliabilityConfig | None = None
    """Pairs: learn whom to believe; null: everybody equally."""

    @property
    def reads(self) -> tuple[str, ...]:
        """The sections of `data` that hold such feedback; any will do."""
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
                "learner.lora: adapters are for language models; a reward model trains all weights, remove it"
            )
        return self

    @model_validator(mode="after")
    def _settings_of_the_kind(self) -> RewardModelConfig:
        if self.reliability is not None and self.kind != "pairs":
            raise ValueError(
                f"reliability is of choices between two; kind is {self.kind}: remove it, or use kind pairs"
            )
        for name, kind in (("margin", "pairs"), ("ranking_loss", "rankings"), ("aspects", "scores")):
            if self.kind != kind and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is read for kind {kind} only, and kind is {self.kind}: remove it")
        return self
