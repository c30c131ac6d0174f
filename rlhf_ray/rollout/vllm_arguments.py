"""vLLM's engine arguments, sampling parameters and end-of-sequence tokens, from this project's configuration."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, GenerationConfig
from vllm import EngineArgs, SamplingParams
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind

from rlhf_ray.config.learner import LoraConfig
from rlhf_ray.config.rollout import RolloutConfig, SamplingConfig

_GIB = 1 << 30
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts for `max_lora_rank`."""


def engine_arguments(model: str, config: RolloutConfig, context: int, lora: LoraConfig | None = None) -> EngineArgs:
    """vLLM's arguments for a Hugging Face folder; `config.engine` overrides them."""
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
        # Token ids in and out: no tokenizer, no text, and no sampling defaults of the model.
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "seed": 0,
    }
    if current_platform.is_cpu():
        arguments["kv_cache_memory_bytes"] = int(config.kv_cache_gb * _GIB)
        # On a CPU a seed gives the same bits in every batch; a cached prefix would change how a prompt is computed.
        arguments["enable_prefix_caching"] = False
        # If a prompt is split over steps, vLLM rewinds the request's random generator, which is not possible on a CPU.
        arguments["enable_chunked_prefill"] = False
        arguments["max_num_batched_tokens"] = max(context, 8192)
    else:
        arguments["gpu_memory_utilization"] = config.gpu_memory_utilization
    if config.weights.kind != "object_store":
        arguments["weight_transfer_config"] = {"backend": config.weights.kind}
    if lora is not None:
        rank = next(rank for rank in _LORA_RANKS if rank >= lora.rank)
        arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}
    return EngineArgs(**{**arguments, **config.engine})


def end_tokens(model: str) -> list[int]:
    """Ids that end a response: those of `generation_config.json` or, without one, of `config.json`."""
    try:
        ends = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        ends = AutoConfig.from_pretrained(model, trust_remote_code=False).eos_token_id
    if ends is None:
        return []
    return [ends] if isinstance(ends, int) else list(ends)


def sampling_parameters(sampling: SamplingConfig, seed: int, ends: list[int]) -> SamplingParams:
    """Parameters of one response that returns the log-probability of every sampled token."""
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
    """Parameters that return the prompt's own log-probabilities, which vLLM does not take from its prefix cache."""
    return SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)
