"""The sources of a reward, and the workers that score responses."""

from __future__ import annotations

import re
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from rlhf_ray.config.section import ImportPath, Section, Workers, check_packing, micro_batch_budget

RequestField = str | int | float | bool
_SET_BY_JUDGE = ("model", "messages", "response_format", "stream", "n")


class EndpointConfig(Section):
    """An HTTP service, and how requests to it are limited and repeated."""

    name: str = Field(min_length=1)
    """Name of this part of the reward in metrics and samples."""
    url: str
    """Address of the service: http or https, without a user or password in it."""
    weight: float = 1.0
    """Factor of the score in the total reward."""
    api_key_env: str | None = None
    """Name of an environment variable where the run is started. Its value is sent as a bearer token. null: no token is
    sent."""
    concurrency: int = Field(16, ge=1)
    """Requests in flight at the same time, for each reward worker."""
    requests_per_minute: float | None = Field(None, gt=0)
    """Limit for all reward workers together; null: no limit."""
    timeout_s: float = Field(120.0, gt=0)
    """Longest time for one request, from its start to its last byte, in seconds."""
    attempts: int = Field(6, ge=1)
    """How often a request is sent if the service cannot be reached, is slow, busy (429) or fails (5xx)."""
    backoff_s: float = Field(1.0, gt=0)
    """Longest wait before the second attempt, in seconds. It doubles with each further attempt, up to a minute.
    `Retry-After` is respected."""
    readings: int = Field(3, ge=1)
    """How often an answer is requested again if it cannot be parsed."""

    @field_validator("url")
    @classmethod
    def _plain_url(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("not a URL; expected http://host/path or https://host/path")
        if parts.username or parts.password:
            raise ValueError("a URL is stored with the config; name the key's variable in api_key_env instead")
        return url

    @field_validator("api_key_env")
    @classmethod
    def _a_variable(cls, name: str | None) -> str | None:
        # API keys contain small letters or dashes, so a key that is put here by mistake is refused before it is stored.
        if name is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
            raise ValueError(
                "not the name of an environment variable (capitals, digits, _); put the key into that variable"
            )
        return name


class HttpSource(EndpointConfig):
    """A service that answers `{"prompts": […], "responses": […], "metadata": […]}` with `{"scores": […]}`.

    A prompt is a list of messages and a response is a text. A score is a number, or null if there is none.
    """

    batch_size: int = Field(64, ge=1)
    """Most responses in one request."""
    model: str | None = None
    """Sent as `model`, for services that have several models; null: not sent."""


class PriceConfig(Section):
    """Prices of tokens, per million, in any currency."""

    prompt: float = Field(0.0, ge=0)
    """Price of tokens that are sent."""
    completion: float = Field(0.0, ge=0)
    """Price of tokens that are received."""


class JudgeSource(EndpointConfig):
    """A language model that compares or rates responses. `url` ends before `/chat/completions`."""

    name: str = Field("judge", min_length=1)
    """Name of this part of the reward in metrics and samples."""
    model: str
    """Name of the model at the endpoint."""
    mode: Literal["pairwise", "pointwise"] = "pairwise"
    """pairwise: the share of comparisons that a response wins, from 0 to 1; each comparison is made in both orders.
    pointwise: a rating, rescaled to (rating − lowest) / (highest − lowest)."""
    reference: str | None = None
    """Key of the prompt's metadata that holds a reference answer. Pairwise: responses are compared with it. Pointwise: the
    judge is shown it. null: no reference; pairwise, the responses to one prompt are compared with each other."""
    opponents: int | None = Field(None, ge=2)
    """Pairwise without a reference: each response is compared with at least this many others of its prompt; null: with
    all."""
    scale: tuple[float, float] = Field((1.0, 10.0), strict=False)
    """Pointwise: lowest and highest rating."""
    rubric: str = "Helpfulness, correctness, honesty and clarity; length is no merit by itself."
    """The criteria for the judge."""
    template: str | None = None
    """Jinja template of the question, which is given `messages`, `metadata`, `rubric`, `fence`, `reference`, and `response`,
    or `response_a` and `response_b`; null: the built-in template."""
    answer: Literal["json", "line"] = "json"
    """Form of the judge's answer. json: JSON with a schema that the endpoint enforces. line: a text whose last line is the
    verdict."""
    request: dict[str, RequestField] = {"temperature": 0.0, "max_tokens": 1024}
    """Further fields of each request."""
    cache: str | None = "judge_cache.sqlite"
    """File that stores every answer, in the run's folder unless the path is absolute; null: none. Without it a resumed run
    asks again and may get other answers."""
    price: PriceConfig | None = None
    """Prices for the metric `cost`; null: costs are not measured."""

    @property
    def needs_groups(self) -> bool:
        """Whether all responses to one prompt must be scored together."""
        return self.mode == "pairwise" and self.reference is None

    @model_validator(mode="after")
    def _settings_of_the_mode(self) -> JudgeSource:
        if not self.scale[0] < self.scale[1]:
            raise ValueError(f"scale must go from a lower to a higher rating; got {list(self.scale)}")
        if self.mode == "pairwise" and self.scale != (1.0, 10.0):
            raise ValueError("scale is for mode pointwise only; mode is pairwise")
        if self.opponents is not None and not self.needs_groups:
            raise ValueError(
                "opponents are other responses of a group: set it for mode pairwise without a reference only"
            )
        if ours := sorted(set(self.request) & set(_SET_BY_JUDGE)):
            raise ValueError(f"request: {', '.join(ours)} cannot be set here; the judge sets it itself")
        return self


class ScorerConfig(Section):
    """Actors that run a frozen model."""

    workers: Workers = Workers(cpus=0.125)
    """Number of actors and what each reserves."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of the weights."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention kernel of transformers."""
    packing: bool = True
    """Put sequences end to end in one row, instead of one padded row for each sequence. The results are the same."""
    micro_batch_tokens: int = Field(default_factory=micro_batch_budget, ge=1)
    """Tokens of one forward pass, including padding. The default is 8192 on a GPU, and 1024 on a CPU, whose cache holds no
    more."""

    @model_validator(mode="after")
    def _attention_can_pack(self) -> ScorerConfig:
        check_packing(self.packing, self.attention)
        return self


class RewardModelSource(Section):
    """A trained reward model as a source of reward."""

    path: str | list[str] | None = None
    """A Hugging Face sequence-classification folder, or several for an ensemble; null: the reward model that this run
    trains."""
    weight: float = 1.0
    """Factor of the normalised score in the total reward."""
    group: str | None = None
    """For a model with annotator groups: the name of the group whose reward is used, or `mean` over all groups; null: the
    common reward r_0."""
    combine: Literal["mean", "min", "uncertainty"] = "mean"
    """Reward of an ensemble: the mean of its members, their minimum, or the mean minus `penalty` · std (arXiv 2310.02743).
    Where members disagree, a policy can exploit the error of one of them."""
    penalty: float = Field(1.0, ge=0)
    """λ of combine uncertainty, without a unit."""
    normalise_on: int = Field(256, ge=0)
    """Prompts that the initial policy answers before the first step, so that the reward has mean 0 and std 1 on its
    responses. Only for a reward model that this run trains. 0: keep the normalisation on the held-out responses."""

    @property
    def paths(self) -> list[str]:
        """The folders in `path`; empty for the reward model that this run trains."""
        return [self.path] if isinstance(self.path, str) else self.path or []

    @field_validator("path")
    @classmethod
    def _some_folder(cls, path: str | list[str] | None) -> str | list[str] | None:
        if path == []:
            raise ValueError(
                "an ensemble needs at least one folder; use null for the reward model that this run trains"
            )
        return path


class RewardFunctionSource(Section):
    """A Python function `(prompts, responses, metadata) -> one number for each response`."""

    name: str
    """Name of this part of the reward in metrics and samples."""
    function: ImportPath
    """`package.module:function`, importable on the nodes of the cluster."""
    weight: float = 1.0
    """Factor of the score in the total reward."""


class RewardConfig(ScorerConfig):
    """The reward of a response: the weighted sum of its sources."""

    model: RewardModelSource | None = RewardModelSource()
    """A reward model; null: none."""
    functions: list[RewardFunctionSource] = []
    """Python functions."""
    judges: list[JudgeSource] = []
    """Language models that compare or rate responses."""
    http: list[HttpSource] = []
    """Services that score responses."""
    on_error: Literal["fail", "drop"] = "fail"
    """What happens if a source raises, or returns NaN or a wrong number of scores. fail: end the run. drop: drop those
    rollouts and record them."""
    batch_tokens: int = Field(16384, ge=1)
    """Rollouts are sent to reward and reference workers as soon as this many tokens are ready."""

    @property
    def services(self) -> list[JudgeSource | HttpSource]:
        """Sources that are requested over the network."""
        return [*self.http, *self.judges]

    @property
    def has_sources(self) -> bool:
        """Whether anything scores responses."""
        return self.model is not None or bool(self.functions or self.services)

    @property
    def needs_groups(self) -> bool:
        """Whether all responses to one prompt must be scored together."""
        return any(judge.needs_groups for judge in self.judges)

    @model_validator(mode="after")
    def _names_differ(self) -> RewardConfig:
        names = [source.name for source in (*self.functions, *self.services)]
        if len(set(names)) != len(names) or "model" in names:
            raise ValueError(
                f"the names of reward.functions, judges and http must differ from each other and from 'model': {names}"
            )
        return self
