"""`RolloutWorker`: a Ray actor with one vLLM engine, and the environment of its process.

Invariants: its coroutines only wait, so weight updates and probes get through while it generates; finished outputs leave in few
messages and never one per token; it does not compute with an incomplete weight update.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_ray.config.learner import LoraConfig
from rlhf_ray.config.rollout import RolloutConfig, SamplingConfig
from rlhf_ray.rollout.requests import EngineOutput, EngineRequest, WorkerInfo
from rlhf_ray.runs.storage.folders import fetch
from rlhf_ray.types import PolicyVersion
from rlhf_ray.weights.bucket import WeightBucket, pack, read_folder


def worker_environment(config: RolloutConfig, override: Mapping[str, str] = {}) -> dict[str, str]:
    """Environment variables of a worker's process. They must be set before vLLM, torch or OpenMP are loaded.

    What a user sets (`rollout.workers.env`) wins over the defaults here, and `override` wins over both.
    """
    common = {
        # The engine runs in the actor's own process: one process to watch, and no messages between processes in every step.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }
    on_cpu = {
        # By default each engine pins itself to core 0.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # Otherwise the sampler compiles a C++ kernel at the first request: it takes 20 s and is no faster afterwards.
        "TORCH_COMPILE_DISABLE": "1",
    }
    return {**common, **({} if config.workers.gpus else on_cpu), **config.workers.process_environment, **override}


class RolloutWorker:
    """An engine and the calls that the driver makes. An asynchronous actor: calls overlap."""

    def __init__(
        self, model: str, config: RolloutConfig, context: int, version: PolicyVersion, lora: LoraConfig | None = None
    ) -> None:
        """Start the engine on a Hugging Face folder of policy `version`; with `lora`, weight updates send adapters only."""
        # Imported here, because the driver imports this module and must not load vLLM.
        from rlhf_ray.rollout.engine import RolloutEngine

        self._config, self._lora = config, lora
        self._engine = RolloutEngine(fetch(model), config, context, version, lora)

    async def generate(
        self, requests: list[EngineRequest], sampling: SamplingConfig
    ) -> AsyncIterator[Sequence[EngineOutput]]:
        """Stream an output for each request, as they finish; those that finish at the same time come together.

        Raises:
            TornWeights, EngineFailed: see `RolloutEngine.generate`.
        """
        loop = asyncio.get_running_loop()
        finished: asyncio.Queue[list[EngineOutput] | Exception] = asyncio.Queue()

        def deliver(outputs: list[EngineOutput] | Exception) -> None:
            loop.call_soon_threadsafe(finished.put_nowait, outputs)

        handles = await asyncio.wrap_future(self._engine.generate(requests, sampling, deliver))
        remaining = len(requests)
        try:
            while remaining:
                outputs = await _drain(finished)
                remaining -= len(outputs)
                yield outputs
        finally:
            if remaining:
                self._engine.abort(handles)

    async def probe(self, token_ids: np.ndarray) -> np.ndarray:
        """float32 [T−1], nats, at temperature 1: log-probabilities of tokens 1… under the current weights."""
        return await asyncio.wrap_future(self._engine.probe(token_ids))

    async def start_weight_update(self) -> None:
        """Begin a weight update in buckets; the worker generates nothing until it is finished."""
        await asyncio.wrap_future(self._engine.start_weight_update("buckets" if self._lora is None else "adapter"))

    async def update_weights(self, bucket: WeightBucket) -> None:
        """Load one bucket."""
        await asyncio.wrap_future(self._engine.load_bucket(bucket))

    async def finish_weight_update(self, version: PolicyVersion) -> None:
        """End the update: the weights are now those of policy `version`."""
        await asyncio.wrap_future(self._engine.finish_weight_update(version))

    async def load_folder(self, path: str, version: PolicyVersion) -> None:
        """Load the weights of a Hugging Face folder of the same architecture (safetensors)."""
        folder = Path(await asyncio.to_thread(fetch, path))
        await asyncio.wrap_future(self._engine.start_weight_update("buckets"))
        for bucket in pack(read_folder(folder), int(self._config.weights.bucket_mb * (1 << 20))):
            await self.update_weights(bucket)
        await self.finish_weight_update(version)

    async def init_native_transfer(self, init_info: dict[str, Any]) -> None:
        """Connect to the learner by vLLM's own transfer engine (`rollout.weights.kind` nccl or ipc)."""
        await asyncio.wrap_future(self._engine.init_native_transfer(init_info))

    async def start_native_update(self) -> None:
        """Begin a weight update by vLLM's own transfer engine."""
        await asyncio.wrap_future(self._engine.start_weight_update("native"))

    async def update_native(self, update_info: dict[str, Any]) -> None:
        """Receive the weights that `update_info` describes."""
        await asyncio.wrap_future(self._engine.update_weights(update_info))

    async def info(self) -> WorkerInfo:
        """This worker's process and model."""
        return WorkerInfo(pid=os.getpid(), host=socket.gethostname(), vocabulary=self._engine.vocabulary)

    async def version(self) -> PolicyVersion | None:
        """Policy version of the weights; None during an update."""
        return self._engine.version

    async def close(self) -> None:
        """Stop the engine and its processes; running requests are not answered."""
        await asyncio.to_thread(self._engine.close)


async def _drain(finished: asyncio.Queue[list[EngineOutput] | Exception]) -> Sequence[EngineOutput]:
    """Everything that has finished by now, at least one output; raises an error that was put into the queue."""
    outputs: list[EngineOutput] = []
    while not outputs or not finished.empty():
        arrived = await finished.get()
        if isinstance(arrived, Exception):
            raise arrived
        outputs += arrived
    return outputs
