"""Rewards that other services give: judges behind an OpenAI-compatible endpoint, and scorers behind a URL.

Invariant: a key never is in a config. A config names the environment variable that holds it, of the process that starts the run.
"""

from __future__ import annotations

import re
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from rlhf_ray.config.section import Section

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
