"""Reward and reference roles."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from rlhf_ray.config.judge import HttpSource, JudgeSource
from rlhf_ray.config.resources import Workers, check_packing, micro_batch_budget
from rlhf_ray.config.section import Section


class ScorerConfig(Section):
    """Actors with a frozen model."""

    workers: Workers = Workers(cpus=0.125)
    """Their number and what each reserves."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of the weights."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention kernel of transformers."""
    packing: bool = True
    """Sequences end to end in one row instead of a row for each, padded to the longest; the same results."""
    micro_batch_tokens: int = Field(default_factory=micro_batch_budget, ge=1)
    """Tokens, padding included, of one forward pass. 8192 on a GPU, 1024 on a CPU, whose cache holds no more."""

    @model_validator(mode="after")
    def _attention_can_pack(self) -> ScorerConfig:
        check_packing(self.packing, self.attention)
        return self


class RewardModelSource(Section):
    """A trained reward model as a source of reward."""

    path: str | list[str] | None = None
    """A Hugging Face sequence-classification folder, or those of an ensemble; None: what this run trains."""
    weight: float = 1.0
    """Factor of its (normalised) score in the total."""
    group: str | None = None
    """Whose reward it is, of a model of annotator groups: a group's name, `mean` over all groups, None: the consensus r_0."""
    combine: Literal["mean", "min", "uncertainty"] = "mean"
    """What an ensemble's reward is: its members' mean, the worst of them, or their mean less `penalty` · std: responses that
    they disagree on are where a policy finds what one of them got wrong (arXiv 2310.02743)."""
    penalty: float = Field(1.0, ge=0)
    """λ of `uncertainty`."""
    normalise_on: int = Field(256, ge=0)
    """Prompts that the policy answers before the first step, to make the reward of a model that this run trains mean 0 and std 1
    on its own answers; 0: as after the reward model's training, on the held-out responses."""

    @property
    def paths(self) -> list[str]:
        """The folders that are named; empty: what this run trains."""
        return [self.path] if isinstance(self.path, str) else self.path or []

    @field_validator("path")
    @classmethod
    def _some_folder(cls, path: str | list[str] | None) -> str | list[str] | None:
        if path == []:
            raise ValueError("an ensemble needs at least one folder; null means what this run trains")
        return path


class RewardFunctionSource(Section):
    """A Python function `(prompts, responses, metadata) -> one number for each response`."""

    name: str
    """How its part is called in metrics and samples."""
    function: str
    """`package.module:function`, importable on the cluster's nodes."""
    weight: float = 1.0
    """Factor of its score in the total."""

    @field_validator("function")
    @classmethod
    def _module_and_name(cls, value: str) -> str:
        module, _, name = value.partition(":")
        if not module or not name:
            raise ValueError(f"{value!r} is not of the form package.module:function")
        return value


class RewardConfig(ScorerConfig):
    """The reward of a response: the weighted sum of its sources."""

    model: RewardModelSource | None = RewardModelSource()
    """A reward model; null for none."""
    functions: list[RewardFunctionSource] = []
    """Python functions."""
    judges: list[JudgeSource] = []
    """Language models that compare or mark responses."""
    http: list[HttpSource] = []
    """Services that score responses."""
    on_error: Literal["fail", "drop"] = "fail"
    """A source that raises or returns NaN or the wrong number of scores ends the run, or drops those rollouts, recorded."""
    batch_tokens: int = Field(16384, ge=1)
    """Rollouts are sent to reward and reference workers as soon as this many tokens are ready."""

    @property
    def services(self) -> list[JudgeSource | HttpSource]:
        """Sources that are asked over the network."""
        return [*self.http, *self.judges]

    @property
    def has_sources(self) -> bool:
        return self.model is not None or bool(self.functions or self.services)

    @property
    def needs_groups(self) -> bool:
        """All responses to one prompt must be scored in one batch."""
        return any(judge.needs_groups for judge in self.judges)

    @model_validator(mode="after")
    def _names_differ(self) -> RewardConfig:
        names = [source.name for source in (*self.functions, *self.services)]
        if len(set(names)) != len(names) or "model" in names:
            raise ValueError(
                f"the names of reward.functions, judges and http must differ from each other and from 'model': {names}"
            )
        return self
