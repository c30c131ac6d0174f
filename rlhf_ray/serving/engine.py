"""vLLM as `ray.serve.llm` runs it, less a process that it does not need on a CPU."""

from __future__ import annotations

from typing import Any

from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine


class OneProcessEngine(VLLMEngine):
    """The scheduler and a model that is not split are in one process, as in vLLM's own server.

    On CPUs `ray.serve.llm` asks vLLM for a process of workers whatever the model's size, so that each step of generation is
    sent to another process and back. On GPUs nothing is changed: there Ray holds the workers.
    """

    def _start_async_llm_engine(self, arguments: Any, config: Any, placement_group: Any) -> Any:
        parallel = config.parallel_config
        if parallel.distributed_executor_backend == "mp" and parallel.world_size == 1:
            parallel.distributed_executor_backend = "uni"
        return super()._start_async_llm_engine(arguments, config, placement_group)
