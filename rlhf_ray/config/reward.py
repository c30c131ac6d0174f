"""Reward and reference roles."""

from __future__ import annotations

import re
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from rlhf_ray.config.section import Section, Workers, check_packing, micro_batch_budget

RequestField = str | int | float | bool
_OURS = ("model", "messages", "response_format", "stream", "n")


class EndpointConfig(Section):
    """A service that is asked over HTTP, and how patiently."""

    name: str = Field(min_length=1)
    """How its part is called in metrics and samples."""
    url: str
    """Where it is: http or https, without a user or password in it."""
    weight: float = 1.0
    """Factor of its score in the total."""
    api_key_env: str | None = None
    """Environment variable, where the run is started, whose value is sent as a bearer token; None: none is sent."""
    concurrency: int = Field(16, ge=1)
    """Requests in flight at once, of each reward worker."""
    requests_per_minute: float | None = Field(None, gt=0)
    """Of all reward workers together; None: as many as are answered."""
    timeout_s: float = Field(120.0, gt=0)
    """For one request, from its start to its last byte."""
    attempts: int = Field(6, ge=1)
    """How often one request is sent where the service cannot be reached, is slow, busy (429) or broken (5xx)."""
    backoff_s: float = Field(1.0, gt=0)
    """Longest wait before the second attempt; doubles with each further one, up to a minute. `Retry-After` is respected."""
    readings: int = Field(3, ge=1)
    """How often an answer is asked for again where it cannot be read."""

    @field_validator("url")
    @classmethod
    def _plain_url(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("not a URL; expected http://host/path or https://host/path")
        if parts.username or parts.password:
            raise ValueError("a URL is written down with the config; name the key's variable in api_key_env instead")
        return url

    @field_validator("api_key_env")
    @classmethod
    def _a_variable(cls, name: str | None) -> str | None:
        # Keys have small letters or dashes: whoever puts one here is told before it is written down.
        if name is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
            raise ValueError("not the name of an environment variable (capitals, digits, _); the key itself goes there")
        return name


class HttpSource(EndpointConfig):
    """A service that answers `{"prompts": […], "responses": […], "metadata": […]}` with `{"scores": […]}`.

    A prompt is its list of messages, a response a text; a score is a number, or null where there is none.
    """

    batch_size: int = Field(64, ge=1)
    """Responses of one request, at most."""
    model: str | None = None
    """Sent as `model`, for services that have several; None: not sent."""


class PriceConfig(Section):
    """What tokens cost, per million, in any currency."""

    prompt: float = Field(0.0, ge=0)
    """Tokens that are sent."""
    completion: float = Field(0.0, ge=0)
    """Tokens that come back."""


class JudgeSource(EndpointConfig):
    """A language model that says which response is better, or how good one is. `url` ends before `/chat/completions`."""

    name: str = Field("judge", min_length=1)
    """How its part is called in metrics and samples."""
    model: str
    """Name of the model at the endpoint."""
    mode: Literal["pairwise", "pointwise"] = "pairwise"
    """`pairwise`: the share of comparisons that a response wins, each made in both orders, between 0 and 1. `pointwise`: a mark,
    as (mark − lowest) / (highest − lowest)."""
    reference: str | None = None
    """Key of the prompt's metadata with an answer: what a response is compared with, or what a marker is shown. None, pairwise:
    the responses to one prompt are compared with each other."""
    opponents: int | None = Field(None, ge=2)
    """Pairwise, without a reference: others of its prompt that each response meets at least; None: all."""
    scale: tuple[float, float] = Field((1.0, 10.0), strict=False)
    """Pointwise: lowest and highest mark."""
    rubric: str = "Helpfulness, correctness, honesty and clarity; length is no merit by itself."
    """What to judge by."""
    template: str | None = None
    """Jinja text of the question, instead of the one that comes along. It is given `messages`, `metadata`, `rubric`, `fence`,
    `reference`, and `response`, or `response_a` and `response_b`."""
    answer: Literal["json", "line"] = "json"
    """How the judge is to answer: JSON by a schema that the endpoint enforces, or a text whose last line is the verdict."""
    request: dict[str, RequestField] = {"temperature": 0.0, "max_tokens": 1024}
    """Further fields of each request."""
    cache: str | None = "judge_cache.sqlite"
    """File that keeps every answer, in the run's folder if it is no absolute path; null: none. Without one a resumed run asks
    again, and perhaps hears something else."""
    price: PriceConfig | None = None
    """For the metric `cost`."""

    @property
    def needs_groups(self) -> bool:
        """Responses to one prompt must be scored together."""
        return self.mode == "pairwise" and self.reference is None

    @model_validator(mode="after")
    def _settings_of_the_mode(self) -> JudgeSource:
        if not self.scale[0] < self.scale[1]:
            raise ValueError(f"scale must go from a lower to a higher mark; got {list(self.scale)}")
        if self.mode == "pairwise" and self.scale != (1.0, 10.0):
            raise ValueError("scale is of mode pointwise; mode is pairwise")
        if self.opponents is not None and not self.needs_groups:
            raise ValueError("opponents are the other responses of a group: for mode pairwise without a reference")
        if ours := sorted(set(self.request) & set(_OURS)):
            raise ValueError(f"request: {', '.join(ours)} is set by the judge itself")
        return self


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
