"""`RolloutWorker`: a Ray actor around one vLLM engine.

Invariants: its coroutines only wait, so that weights, probes and health checks get through while it generates; finished
samples leave in as few messages as the network takes, never one per token; it never answers from torn weights.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray

from rlhf_ray.config.learner import LoraConfig
from rlhf_ray.config.rollout import RolloutConfig, SamplingConfig
from rlhf_ray.rollout.requests import Sample, SampleRequest, WorkerInfo
from rlhf_ray.runs.storage.folders import fetch
from rlhf_ray.types import PolicyVersion
from rlhf_ray.weights.bucket import WeightBucket, pack, read_folder


class RolloutWorker:
    """An engine and what the driver may ask of it. An asynchronous actor: calls overlap."""

    def __init__(
        self, model: str, config: RolloutConfig, context: int, version: PolicyVersion, lora: LoraConfig | None = None
    ) -> None:
        """Start the engine on a Hugging Face folder that holds policy `version`; `lora`: publications are of adapters."""
        # Here and not above: a driver imports this module, and must not load vLLM.
        from rlhf_ray.rollout.engine import RolloutEngine

        self._config, self._lora = config, lora
        self._engine = RolloutEngine(fetch(model), config, context, version, lora)

    async def generate(self, requests: list[SampleRequest], sampling: SamplingConfig) -> AsyncIterator[list[Sample]]:
        """Stream the samples, each once, in the order in which they finish; what finishes together comes together.

        Raises:
            PromptRefused, TornWeights, EngineFailed: as `RolloutEngine.generate`.
        """
        loop = asyncio.get_running_loop()
        finished: asyncio.Queue[list[Sample] | Exception] = asyncio.Queue()

        def deliver(samples: list[Sample] | Exception) -> None:
            loop.call_soon_threadsafe(finished.put_nowait, samples)

        handles = await asyncio.wrap_future(self._engine.generate(requests, sampling, deliver))
        remaining = len(requests)
        try:
            while remaining:
                samples = await _drain(finished)
                remaining -= len(samples)
                yield samples
        finally:
            if remaining:
                self._engine.abort(handles)

    async def probe(self, token_ids: np.ndarray) -> np.ndarray:
        """float32 [T−1], nats, at temperature 1: log-probabilities of tokens 1… under the weights of now."""
        return await asyncio.wrap_future(self._engine.probe(token_ids))

    async def start_weight_update(self) -> None:
        """Begin an update by buckets; the worker generates nothing until it is finished."""
        await asyncio.wrap_future(self._engine.start_weight_update("buckets" if self._lora is None else "adapter"))

    async def update_weights(self, bucket: WeightBucket) -> None:
        """Load one bucket."""
        await asyncio.wrap_future(self._engine.load_bucket(bucket))

    async def finish_weight_update(self, version: PolicyVersion) -> None:
        """End the update: the weights are policy `version` from here on."""
        await asyncio.wrap_future(self._engine.finish_weight_update(version))

    async def load_folder(self, path: str, version: PolicyVersion) -> None:
        """Take over the weights of a Hugging Face folder of the same architecture (safetensors)."""
        folder = Path(await asyncio.to_thread(fetch, path))
        await asyncio.wrap_future(self._engine.start_weight_update("buckets"))
        for bucket in pack(read_folder(folder), int(self._config.weights.bucket_mb * (1 << 20))):
            await self.update_weights(bucket)
        await self.finish_weight_update(version)

    async def init_native_transfer(self, init_info: dict[str, Any]) -> None:
        """Join the learner by vLLM's own transfer engine (`rollout.weights.kind` nccl or ipc)."""
        await asyncio.wrap_future(self._engine.init_native_transfer(init_info))

    async def start_native_update(self) -> None:
        """Begin an update by vLLM's own transfer engine."""
        await asyncio.wrap_future(self._engine.start_weight_update("native"))

    async def update_native(self, update_info: dict[str, Any]) -> None:
        """Receive what `update_info` announces."""
        await asyncio.wrap_future(self._engine.update_weights(update_info))

    async def health(self) -> PolicyVersion | None:
        """The policy version, after a forward pass: an engine can be dead while its process answers."""
        await self.probe(np.zeros(2, dtype=np.int32))
        return self._engine.version

    async def info(self) -> WorkerInfo:
        """What runs here, and where."""
        import torch
        import vllm
        from vllm.platforms import current_platform

        return WorkerInfo(
            pid=os.getpid(),
            node_id=ray.get_runtime_context().get_node_id(),
            host=socket.gethostname(),
            device=current_platform.get_device_name() or current_platform.device_type,
            vllm=vllm.__version__,
            torch=torch.__version__,
            threads=torch.get_num_threads(),
            vocabulary=self._engine.vocabulary,
            context=self._engine.context,
            version=self._engine.version,
        )

    async def version(self) -> PolicyVersion | None:
        """Policy version of the weights; None in the middle of an update."""
        return self._engine.version

    async def close(self) -> None:
        """Stop the engine and its processes; what still runs is not answered."""
        await asyncio.to_thread(self._engine.close)


async def _drain(finished: asyncio.Queue[list[Sample] | Exception]) -> Sequence[Sample]:
    """All that has finished by now, at least one; raises what was put there to be raised."""
    samples: list[Sample] = []
    while not samples or not finished.empty():
        arrived = await finished.get()
        if isinstance(arrived, Exception):
            raise arrived
        samples += arrived
    return samples
