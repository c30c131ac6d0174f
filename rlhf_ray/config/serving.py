"""An endpoint that serves policies: engines, API keys and limits; and how a run publishes to it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rlhf_ray.config.section import Section, Workers


class ReplicasConfig(Section):
    """Ray Serve's autoscaling of the engines of each version."""

    minimum: int = Field(1, ge=1)
    """Fewest replicas."""
    maximum: int = Field(1, ge=1)
    """Most replicas."""
    target_ongoing_requests: float = Field(16.0, gt=0)
    """Running requests per replica that autoscaling aims for."""

    @model_validator(mode="after")
    def _in_order(self) -> ReplicasConfig:
        if self.maximum < self.minimum:
            raise ValueError(f"maximum {self.maximum} is below minimum {self.minimum}")
        return self


class ServedEngineConfig(Section):
    """The vLLM engine of each replica."""

    workers: Workers = Workers(cpus=0.5)
    """What each replica reserves. `count` is not used, see `replicas`."""
    tensor_parallel: int = Field(1, ge=1)
    """GPUs over which vLLM splits the model."""
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    """Type of the weights. auto: as they are stored."""
    quantization: str | None = None
    """A quantization of vLLM for GPUs, such as `fp8` or `experts_int8`; null: none."""
    max_sequence_tokens: int | None = Field(None, ge=2)
    """Longest prompt and response together, in tokens; null: the context length of the model."""
    max_concurrent: int = Field(64, ge=1)
    """Sequences that one replica generates at the same time. Further requests wait."""
    kv_cache_gb: float = Field(1.0, gt=0)
    """On a CPU: memory for the key/value cache, in GiB."""
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    """On a GPU: share of its memory that vLLM may use. Use less than 0.45 if two versions share one GPU."""
    enforce_eager: bool = True
    """Skip graph capture and compilation, for a fast start. Set it to false on GPUs, where they pay off."""
    engine: dict[str, Any] = {}
    """Further vLLM engine arguments, passed on as they are."""

    @field_validator("engine")
    @classmethod
    def _nothing_unsafe(cls, engine: dict[str, Any]) -> dict[str, Any]:
        if engine.get("trust_remote_code"):
            raise ValueError(
                "engine.trust_remote_code would run code from the model's folder and is not allowed; remove it"
            )
        return engine


class LimitsConfig(Section):
    """Limits on requests. Status codes: 413 request too large, 400 too many tokens, 429 too many requests of a key, 503 too
    many in flight."""

    body_kb: int = Field(256, ge=1)
    """Largest request, in KiB."""
    max_tokens: int = Field(512, ge=1)
    """Most tokens that a request may ask for, and the number of a request that does not say."""
    choices: int = Field(4, ge=1)
    """Most responses to one request: `n` times its prompts."""
    requests_per_minute: int = Field(600, ge=1)
    """Limit for each key in any 60 seconds, at each gateway."""
    in_flight: int = Field(256, ge=1)
    """Running and waiting requests at each gateway. Above it, requests are refused with 503 at once."""
    timeout_s: float = Field(300.0, gt=0)
    """Longest time for a response, in seconds. Replicas that are stopped have as long to finish their requests."""


class ServingConfig(Section):
    """One endpoint. Every version of the policy that it serves has its own engines."""

    name: str = "policy"
    """Name of the endpoint, and of the model for clients."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0: all addresses of this machine."""
    port: int = Field(8000, ge=1, le=65535)
    """Port to listen on."""
    policy: ServedEngineConfig = ServedEngineConfig()
    """Engines."""
    replicas: ReplicasConfig = ReplicasConfig()
    """Number of replicas of each version's engines."""
    gateways: int = Field(1, ge=1)
    """Processes that check, route and count requests."""
    limits: LimitsConfig = LimitsConfig()
    """Limits on requests."""
    keys_env: str | None = "RLHF_RAY_API_KEYS"
    """Environment variable with the API keys as `name:key`, separated by commas. If it is not set, one key is made and
    printed once. null: no key is needed."""
    cors_origins: list[str] = []
    """Web pages that may send requests from a browser, such as `https://example.org`."""
    reward_model: str | None = None
    """Folder of a reward model that scores responses at `/v1/score`, or `URI#reward_model` of a run on a store; null:
    none."""
    rewards: Workers = Workers(cpus=0.25)
    """What each replica of the reward model reserves; `count` is the number of replicas."""
    start_s: float = Field(1800.0, gt=0)
    """Longest wait until the gateway and the engines of a version run, in seconds. It includes the wait for nodes with room
    for them."""
    drain_s: float = Field(60.0, ge=0)
    """Longest wait for the running requests of a retired version, in seconds."""

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str) -> str:
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,40}", name):
            raise ValueError("must consist of a-z, 0-9 and -, at most 41 characters")
        return name

    @field_validator("reward_model")
    @classmethod
    def _absolute(cls, folder: str | None) -> str | None:
        """Make a relative path absolute, because other processes have other working directories."""
        return folder if folder is None or "://" in folder else str(Path(folder).expanduser().absolute())

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, origins: list[str]) -> list[str]:
        wrong = [origin for origin in origins if not re.fullmatch(r"https?://[^/*]+", origin)]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: an origin is http(s)://host[:port], without a path or *")
        return origins


class PublishingConfig(Section):
    """Publishes new versions to a running endpoint (`rlhf-ray serve --address`) during training."""

    endpoint: str = "policy"
    """Name of the endpoint. It runs on the same cluster as the run."""
    every: int = Field(10, ge=1)
    """Steps between two evaluations, each of which may publish the policy."""
    prompts: int = Field(64, ge=8)
    """Held-out prompts that every candidate answers once. All are used if there are fewer."""
    better_than: float = Field(0.5, ge=0, lt=1)
    """A policy is published if the lower end of the 95 % interval of its win rate is above this. Its opponent is the version
    that was published last, or the policy at the start of this run. `evaluation.utility` decides who wins, or else the
    reward."""
    kl_limit: float | None = Field(None, gt=0)
    """A policy whose KL from the reference is above this, in nats per response, is not published; null: no limit."""
    share: float = Field(1.0, gt=0, le=1)
    """Share of the traffic that a new version gets. Below 1 it is a canary until `rlhf-ray promote` is called or a better
    version replaces it."""
