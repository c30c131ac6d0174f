"""Environment of a rollout worker's process. It must be set before vLLM, torch or OpenMP are loaded, hence as Ray's
runtime_env.

Invariant: what a user sets (`rollout.workers.env`) wins over every default here.
"""

from __future__ import annotations

from collections.abc import Mapping

from rlhf_ray.config.rollout import RolloutConfig


def worker_environment(config: RolloutConfig, override: Mapping[str, str] = {}) -> dict[str, str]:
    """Environment variables of a worker's process; `override` holds the user's and the placement's."""
    common = {
        # The engine runs in the actor's own process: one process to watch, no message passing for every step.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }
    on_cpu = {
        # By default each engine pins itself to core 0.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # Otherwise the sampler compiles a C++ kernel at the first request: 20 s, and no faster after it.
        "TORCH_COMPILE_DISABLE": "1",
    }
    return {**common, **({} if config.workers.gpus else on_cpu), **config.workers.process_environment, **override}
