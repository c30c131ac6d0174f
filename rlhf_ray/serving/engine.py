"""vLLM as `ray.serve.llm` runs it, less a process that it does not need on a CPU; and models that it cannot fetch by itself."""

from __future__ import annotations

from typing import Any

from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine

from rlhf_ray.runs.storage.folders import copy_here
from rlhf_ray.runs.storage.location import copy_of


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


class FromStore(CallbackBase):
    """Brings `model`, a folder of a run on a store, to each node of an engine before it is loaded there."""

    async def on_before_node_init(self) -> None:
        """Say where it will lie: at the same place on every node."""
        self.llm_config.get_engine_config().hf_model_id = str(copy_of(self.kwargs["model"]))

    def on_before_download_model_files_distributed(self) -> None:
        """Fetch it; called on each node."""
        copy_here(self.kwargs["model"])
