"""From this project's configuration to vLLM's: engine arguments, sampling parameters and end-of-sequence tokens."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, GenerationConfig
from vllm import EngineArgs, SamplingParams
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind

from rlhf_ray.config.learner import LoraConfig
from rlhf_ray.config.rollout import RolloutConfig, SamplingConfig
from rlhf_ray.weights.adapter import lora_arguments

_GIB = 1 << 30


def engine_arguments(model: str, config: RolloutConfig, context: int, lora: LoraConfig | None = None) -> EngineArgs:
    """vLLM's arguments for a Hugging Face folder; `config.engine` has the last word."""
    arguments: dict[str, Any] = {
        "model": model,
        "dtype": config.dtype,
        "max_model_len": context,
        "max_num_seqs": config.max_concurrent,
        "tensor_parallel_size": config.tensor_parallel,
        "distributed_executor_backend": "uni" if config.tensor_parallel == 1 else "mp",
        "enforce_eager": config.enforce_eager,
        "logprobs_mode": "processed_logprobs",
        "worker_extension_cls": "rlhf_ray.weights.receiving.BucketReload",
        # Token ids in and out: no tokenizer, no text, and no sampling defaults but our own.
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "seed": 0,
    }
    if current_platform.is_cpu():
        arguments["kv_cache_memory_bytes"] = int(config.kv_cache_gb * _GIB)
        # On a CPU a seed gives the same bits in any company; a cached prefix would change how a prompt is computed.
        arguments["enable_prefix_caching"] = False
        # A prompt that is split over steps makes vLLM rewind the request's random generator, which a CPU generator cannot.
        arguments["enable_chunked_prefill"] = False
        arguments["max_num_batched_tokens"] = max(context, 8192)
    else:
        arguments["gpu_memory_utilization"] = config.gpu_memory_utilization
    if config.weights.kind != "object_store":
        arguments["weight_transfer_config"] = {"backend": config.weights.kind}
    if lora is not None:
        arguments |= lora_arguments(lora)
    return EngineArgs(**{**arguments, **config.engine})


def end_tokens(model: str) -> list[int]:
    """Ids that end a response: those of `generation_config.json`, else of `config.json`."""
    try:
        ends = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        ends = AutoConfig.from_pretrained(model, trust_remote_code=False).eos_token_id
    if ends is None:
        return []
    return [ends] if isinstance(ends, int) else list(ends)


def sampling_parameters(sampling: SamplingConfig, seed: int, ends: list[int]) -> SamplingParams:
    """Parameters of one response, with the log-probability of every sampled token."""
    return SamplingParams(
        temperature=sampling.temperature,
        max_tokens=sampling.max_new_tokens,
        seed=seed,
        ignore_eos=sampling.ignore_eos,
        stop_token_ids=None if sampling.ignore_eos else ends,
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def probe_parameters() -> SamplingParams:
    """Parameters that return the prompt's own log-probabilities, which vLLM never takes from its prefix cache."""
    return SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)
