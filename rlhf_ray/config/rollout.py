"""Generation: vLLM workers, how they sample, how new weights reach them, and the environment of multi-turn episodes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from rlhf_ray.config.section import Section, Workers


class SamplingConfig(Section):
    """How a response is drawn from the policy."""

    max_new_tokens: int = Field(64, ge=1)
    """Longest response, in tokens, end-of-sequence token included."""
    temperature: float = Field(1.0, gt=0)
    """Divides the logits, in the engine and in the learners alike (algorithms 1.19)."""
    ignore_eos: bool = False
    """Go on after the end-of-sequence token up to `max_new_tokens`; for benchmarks."""

    @model_validator(mode="before")
    @classmethod
    def _whole_distribution(cls, values: Any) -> Any:
        """Engines renormalise what such settings leave: neither a ratio nor a KL would be of the policy that is trained."""
        cut = sorted({"top_p", "top_k", "min_p"} & set(values)) if isinstance(values, dict) else []
        if cut:
            raise ValueError(
                f"{', '.join(cut)}: training samples from the whole distribution. What is cut off can never be learnt, and the "
                "log-probabilities of the rest would be of another, renormalised policy; use temperature alone"
            )
        return values


class WeightChannelConfig(Section):
    """How a new policy travels from the learners to the rollout workers."""

    kind: Literal["object_store", "nccl", "ipc"] = "object_store"
    """`object_store` works on any hardware; `nccl` (across GPUs) and `ipc` (colocated on one GPU) are vLLM's own."""
    lora: Literal["merged", "adapter"] = "merged"
    """Of a policy with adapters: all weights, the adapters merged into them; or the adapters alone, which the engine applies as
    it generates: a few per cent of the bytes, for slower tokens."""
    bucket_mb: float = Field(256.0, gt=0)
    """Size of one transfer, in MiB: what a publication needs beside the weights themselves."""
    probe_tokens: int = Field(32, ge=2)
    """Length of the sequence on which a worker must agree with the learner after each publication."""
    probe_tolerance: float = Field(1e-4, gt=0)
    """Largest |Δ logprob| on the probe, in nats; 1e-4 for fp32. For bf16 the mean is compared: use 0.05."""
    timeout_s: float = Field(600.0, gt=0)
    """A worker that has not confirmed a publication by then is not used any more."""

    @model_validator(mode="after")
    def _channel_of_adapters(self) -> WeightChannelConfig:
        if self.lora == "adapter" and self.kind != "object_store":
            raise ValueError(
                f"lora: adapter travels by kind object_store only, and kind is {self.kind}; adapters are small, so use that, or "
                "lora: merged"
            )
        return self


class RolloutConfig(Section):
    """Rollout workers."""

    workers: Workers = Workers(cpus=0.5)
    """Their number and what each reserves. `gpus` is per worker and must equal `tensor_parallel` when whole."""
    tensor_parallel: int = Field(1, ge=1)
    """GPUs over which vLLM splits one worker's model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights in the engine."""
    max_sequence_tokens: int | None = None
    """Longest prompt + response that the engine accepts; None: `data.max_prompt_tokens` + `max_new_tokens`."""
    max_concurrent: int = Field(256, ge=1)
    """Sequences that one worker generates at a time."""
    kv_cache_gb: float = Field(0.5, gt=0)
    """On a CPU: memory for the key/value cache of each worker, in GiB."""
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    """On a GPU: the share of its memory that vLLM may take."""
    enforce_eager: bool = True
    """Skip graph capture and compilation; turn off on GPUs, where they pay."""
    engine: dict[str, Any] = {}
    """Further vLLM engine arguments, passed through."""
    sampling: SamplingConfig = SamplingConfig()
    """How responses are drawn."""
    weights: WeightChannelConfig = WeightChannelConfig()
    """How new policies arrive."""

    @field_validator("engine")
    @classmethod
    def _logprobs_are_of_the_policy(cls, engine: dict[str, Any]) -> dict[str, Any]:
        if engine.get("logprobs_mode", "processed_logprobs") != "processed_logprobs":
            raise ValueError(
                "engine.logprobs_mode must stay processed_logprobs: log-probabilities before temperature are not of the policy "
                "that sampled"
            )
        return engine

    @model_validator(mode="after")
    def _gpus_match_tensor_parallel(self) -> RolloutConfig:
        gpus = self.workers.gpus
        if (self.tensor_parallel > 1 or gpus > 1) and gpus not in (0, self.tensor_parallel):
            raise ValueError(
                f"tensor_parallel is {self.tensor_parallel} and workers.gpus is {gpus:g}; "
                "a worker splits its model over all of its GPUs: set workers.gpus to the same number"
            )
        return self


class EnvironmentConfig(Section):
    """Who answers the policy between its turns (`rlhf_ray.environments`); without this section a rollout is one response."""

    # The key is a word that Python keeps for itself; what is written down must be read back.
    model_config = ConfigDict(serialize_by_alias=True)

    factory: str = Field(alias="class")
    """`package.module:Class` with `reset` and `step`, importable where the run is started; one object for each episode."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of the class."""
    max_turns: int = Field(4, ge=1)
    """Most turns of the policy in one episode; each may have `rollout.sampling.max_new_tokens`."""
    max_observation_tokens: int = Field(64, ge=1)
    """Longest answer of the environment, in tokens, with what the chat template puts around it; a longer one is an error."""
    concurrency: int = Field(64, ge=1)
    """Calls of `reset` and `step` at a time, each in a thread of its own."""
    timeout_s: float = Field(60.0, gt=0)
    """Longest time for one of them."""
    on_error: Literal["fail", "drop"] = "fail"
    """An environment that raises, is too slow or answers what cannot be used ends the run, or its group is dropped, recorded."""

    @field_validator("factory")
    @classmethod
    def _module_and_class(cls, value: str) -> str:
        module, _, name = value.partition(":")
        if not module or not name:
            raise ValueError(f"{value!r} is not of the form package.module:Class")
        return value
