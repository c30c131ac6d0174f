"""Generation: vLLM workers, how they sample, how new weights reach them, and the environment of multi-turn episodes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from rlhf_ray.config.section import ImportPath, Section, Workers


class SamplingConfig(Section):
    """How responses are sampled from the policy."""

    max_new_tokens: int = Field(64, ge=1)
    """Longest response, in tokens, including the end-of-sequence token."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature. Learners compute log-probabilities at the same temperature (RLHF implementation details
    1.19)."""
    ignore_eos: bool = False
    """Continue after the end-of-sequence token up to `max_new_tokens`. For benchmarks."""

    @model_validator(mode="before")
    @classmethod
    def _whole_distribution(cls, values: Any) -> Any:
        """Refuse truncated sampling: engines renormalise what it leaves, so ratios and KL would not be those of the policy."""
        cut = sorted({"top_p", "top_k", "min_p"} & set(values)) if isinstance(values, dict) else []
        if cut:
            raise ValueError(
                f"{', '.join(cut)}: training samples from the whole distribution. Tokens that are cut off are never learned, "
                "and the log-probabilities of the others would be renormalised; use temperature only"
            )
        return values


class WeightChannelConfig(Section):
    """How new weights travel from the learners to the rollout workers."""

    kind: Literal["object_store", "nccl", "ipc"] = "object_store"
    """object_store: Ray's object store, on any hardware. nccl: between GPUs. ipc: between processes on one GPU. The last two
    are vLLM's own channels."""
    lora: Literal["merged", "adapter"] = "merged"
    """What is sent of a policy with adapters. merged: all weights with the adapters added. adapter: only the adapters, a few
    per cent of the bytes; the engine applies them while it generates, which makes tokens slower."""
    bucket_mb: float = Field(256.0, gt=0)
    """Size of one transfer, in MiB. A weight update needs this much memory in addition to the weights."""
    probe_tokens: int = Field(32, ge=2)
    """Length of the sequence on which every worker must agree with the learner after each weight update, in tokens."""
    probe_tolerance: float = Field(1e-4, gt=0)
    """Largest difference of log-probabilities on the probe sequence, in nats. 1e-4 is for fp32. For bf16 the mean difference
    is compared: use 0.05."""
    timeout_s: float = Field(600.0, gt=0)
    """A worker that has not confirmed a weight update within this many seconds is not used any more."""

    @model_validator(mode="after")
    def _channel_of_adapters(self) -> WeightChannelConfig:
        if self.lora == "adapter" and self.kind != "object_store":
            raise ValueError(
                f"lora: adapter needs kind object_store, and kind is {self.kind}; use object_store, which is fast enough for "
                "adapters, or lora: merged"
            )
        return self


class RolloutConfig(Section):
    """Workers that generate rollouts with vLLM."""

    workers: Workers = Workers(cpus=0.5)
    """Number of workers and what each reserves. If `gpus` is 1 or more, it must equal `tensor_parallel`."""
    tensor_parallel: int = Field(1, ge=1)
    """GPUs over which vLLM splits the model of one worker."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights in the engine."""
    max_sequence_tokens: int | None = None
    """Longest prompt and response together that the engine accepts, in tokens; null: the sum of `data.max_prompt_tokens` and
    the longest rollout."""
    max_concurrent: int = Field(256, ge=1)
    """Sequences that one worker generates at the same time."""
    kv_cache_gb: float = Field(0.5, gt=0)
    """On a CPU: memory for the key/value cache of each worker, in GiB."""
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    """On a GPU: share of its memory that vLLM may use."""
    enforce_eager: bool = True
    """Skip graph capture and compilation, for a fast start. Set it to false on GPUs, where they pay off."""
    engine: dict[str, Any] = {}
    """Further vLLM engine arguments, passed on as they are."""
    sampling: SamplingConfig = SamplingConfig()
    """How responses are sampled."""
    weights: WeightChannelConfig = WeightChannelConfig()
    """How new weights reach the workers."""

    @field_validator("engine")
    @classmethod
    def _logprobs_are_of_the_policy(cls, engine: dict[str, Any]) -> dict[str, Any]:
        if engine.get("logprobs_mode", "processed_logprobs") != "processed_logprobs":
            raise ValueError(
                "engine.logprobs_mode must stay processed_logprobs: log-probabilities before temperature are not those of the "
                "policy that sampled"
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
    """The environment that answers the policy between its turns (`rlhf_ray.environments`). Without this section a rollout is
    one response."""

    # `class` is a keyword of Python, so the field has another name. Dumped configs use the key that is read.
    model_config = ConfigDict(serialize_by_alias=True)

    factory: ImportPath = Field(alias="class")
    """`package.module:Class` with the methods `reset` and `step`, importable where the run is started. Each episode has its
    own object."""
    arguments: dict[str, Any] = {}
    """Keyword arguments for the class."""
    max_turns: int = Field(4, ge=1)
    """Most turns of the policy in one episode. Each may have `rollout.sampling.max_new_tokens` tokens."""
    max_observation_tokens: int = Field(64, ge=1)
    """Longest answer of the environment, in tokens, including what the chat template adds to it. A longer one is an
    error."""
    concurrency: int = Field(64, ge=1)
    """Calls of `reset` and `step` that run at the same time, each in its own thread."""
    timeout_s: float = Field(60.0, gt=0)
    """Longest time for one call, in seconds."""
    on_error: Literal["fail", "drop"] = "fail"
    """What happens if the environment raises, times out or returns an invalid answer. fail: end the run. drop: drop the
    group and record it."""
