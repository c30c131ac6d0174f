"""An endpoint that serves policies: its engines, who may ask, and how much."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rlhf_ray.config.section import Section, Workers


class ReplicasConfig(Section):
    """Ray Serve's autoscaling of each version's engines."""

    minimum: int = Field(1, ge=1)
    """Replicas that are always there."""
    maximum: int = Field(1, ge=1)
    """Most replicas."""
    target_ongoing_requests: float = Field(16.0, gt=0)
    """Requests in work per replica that scaling aims at."""

    @model_validator(mode="after")
    def _in_order(self) -> ReplicasConfig:
        if self.maximum < self.minimum:
            raise ValueError(f"maximum {self.maximum} is below minimum {self.minimum}")
        return self


class ServedEngineConfig(Section):
    """vLLM, as each replica runs it."""

    workers: Workers = Workers(cpus=0.5)
    """What each replica reserves; `count` is not read, see `replicas`."""
    tensor_parallel: int = Field(1, ge=1)
    """GPUs over which vLLM splits the model."""
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    """Type of the weights; auto: that of the folder."""
    quantization: str | None = None
    """As vLLM offers it on GPUs: `fp8`, `experts_int8`, …; null: none."""
    max_sequence_tokens: int | None = Field(None, ge=2)
    """Longest prompt and answer; null: what the model reads."""
    max_concurrent: int = Field(64, ge=1)
    """Sequences that one replica generates at a time; further ones wait."""
    kv_cache_gb: float = Field(1.0, gt=0)
    """On a CPU: memory for the key/value cache, in GiB."""
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    """On a GPU: the share of its memory that vLLM may take. Two versions live side by side: on one GPU below 0.45."""
    enforce_eager: bool = True
    """Skip graph capture and compilation; turn off on GPUs, where they pay."""
    engine: dict[str, Any] = {}
    """Further vLLM engine arguments, passed through."""

    @field_validator("engine")
    @classmethod
    def _nothing_unsafe(cls, engine: dict[str, Any]) -> dict[str, Any]:
        if engine.get("trust_remote_code"):
            raise ValueError("engine.trust_remote_code would run code of the model's folder; it stays off")
        return engine


class LimitsConfig(Section):
    """What is refused, and how: 413 too large, 400 too many tokens, 429 too often, 503 too busy."""

    body_kb: int = Field(256, ge=1)
    """Largest request, in KiB."""
    max_tokens: int = Field(512, ge=1)
    """Most tokens that a request may ask for, and what one gets that does not say."""
    choices: int = Field(4, ge=1)
    """Most answers to one request: `n`, of each of its prompts."""
    requests_per_minute: int = Field(600, ge=1)
    """Of one key, in any 60 seconds, at each gateway."""
    in_flight: int = Field(256, ge=1)
    """Requests in work or waiting at each gateway; above it, 503 at once rather than a long wait."""
    timeout_s: float = Field(300.0, gt=0)
    """Longest time for an answer; also how long a version that is retired has to finish what it began."""


class ServingConfig(Section):
    """One endpoint. Every version of the policy that it serves has engines of its own."""

    name: str = "policy"
    """Of the endpoint, and of the model for clients."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for everybody who has a key."""
    port: int = Field(8000, ge=1, le=65535)
    """Port to listen on."""
    policy: ServedEngineConfig = ServedEngineConfig()
    """Engines."""
    replicas: ReplicasConfig = ReplicasConfig()
    """Of each version's engines."""
    gateways: int = Field(1, ge=1)
    """Processes that check, route and count requests."""
    limits: LimitsConfig = LimitsConfig()
    """What is refused."""
    keys_env: str | None = "RLHF_RAY_API_KEYS"
    """Environment variable with the keys, `name:key` with commas between; where it is not set, one is made and printed once.
    null: whoever reaches the port may ask."""
    cors_origins: list[str] = []
    """Web pages that may ask from a browser, such as `https://example.org`; none unless set."""
    reward_model: str | None = None
    """A reward model's folder, to score answers at `/v1/score`; or `URI#reward_model` of a run on a store."""
    rewards: Workers = Workers(cpus=0.25)
    """What the reward model's replica reserves; `count` replicas."""
    start_s: float = Field(1800.0, gt=0)
    """Longest wait for the engines of a version, or the gateway, to come up; also for nodes with room for them."""
    drain_s: float = Field(60.0, ge=0)
    """Longest wait for the requests of a version that is retired."""

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str) -> str:
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,40}", name):
            raise ValueError("must be of a-z, 0-9 and -, at most 41 characters")
        return name

    @field_validator("reward_model")
    @classmethod
    def _absolute(cls, folder: str | None) -> str | None:
        """What a relative path means here, it would not mean on the nodes."""
        return folder if folder is None or "://" in folder else str(Path(folder).expanduser().absolute())

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, origins: list[str]) -> list[str]:
        wrong = [origin for origin in origins if not re.fullmatch(r"https?://[^/*]+", origin)]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: an origin is http(s)://host[:port], without a path or *")
        return origins


class PublishingConfig(Section):
    """New versions for a running endpoint (`rlhf-ray serve --address`), while training goes on."""

    endpoint: str = "policy"
    """Name of the endpoint. It runs on the cluster of the run."""
    every: int = Field(10, ge=1)
    """Steps between two evaluations; each of them may publish."""
    prompts: int = Field(64, ge=8)
    """Held-out prompts that every candidate answers once; all where there are fewer."""
    better_than: float = Field(0.5, ge=0, lt=1)
    """A policy is published when the lower end of the 95 % interval of its win rate against the one that was published last, or
    against the one that this run began with, is above this. Won is what `evaluation.utility` prefers, or else the reward."""
    kl_limit: float | None = Field(None, gt=0)
    """Nats per response: a policy that is further from the reference is not published, whatever its reward; null: no limit."""
    share: float = Field(1.0, gt=0, le=1)
    """Of the traffic that a new version gets. Below 1 it is a canary until somebody says `rlhf-ray promote`, or a better one
    takes its place."""
