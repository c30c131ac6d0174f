"""Weights through Ray's object store: works on any hardware and between any nodes.

Invariants: the driver handles references, never weights; at most three buckets live in the object store (two that the learner
may produce ahead, one that is being loaded); a worker that fails is left out of the rest and does not hold up the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from ray import ObjectRef
from ray.actor import ActorHandle

from rlhf_ray.config.rollout import WeightChannelConfig
from rlhf_ray.rollout.weights.base import PublishingLearner
from rlhf_ray.types import PolicyVersion

_AHEAD = 2
"""Buckets that the learner packs before one is fetched: one travels while the next is packed."""


class ObjectStoreChannel:
    """Streams buckets from rank 0 of the learner to all workers at once."""

    def __init__(self, config: WeightChannelConfig) -> None:
        self._bucket_bytes = int(config.bucket_mb * (1 << 20))
        self._timeout_s = config.timeout_s

    async def send(
        self, learner: PublishingLearner, workers: Mapping[str, ActorHandle], version: PolicyVersion
    ) -> dict[str, Exception]:
        """See `WeightChannel.send`; each worker has `timeout_s` for every bucket."""
        receivers = _Receivers(workers, self._timeout_s)
        streams = [
            rank.weight_buckets.options(num_returns="streaming", _generator_backpressure_num_objects=_AHEAD).remote(
                self._bucket_bytes
            )
            for rank in learner.ranks
        ]
        await receivers.call(lambda worker: worker.start_weight_update.remote())

        async def forward() -> None:
            async for bucket in streams[0]:
                await receivers.call(lambda worker, bucket=bucket: worker.update_weights.remote(bucket))

        # The other ranks yield nothing, but under sharding rank 0 waits for them at every gathering.
        await asyncio.gather(forward(), *(_exhaust(stream) for stream in streams[1:]))
        # A generator that raised ends like one that is done: its completion says which.
        await asyncio.gather(*(stream.completed() for stream in streams))
        await receivers.call(lambda worker: worker.finish_weight_update.remote(version))
        return receivers.failures


class _Receivers:
    """The workers that still follow."""

    def __init__(self, workers: Mapping[str, ActorHandle], timeout_s: float) -> None:
        self._workers = dict(workers)
        self._timeout_s = timeout_s
        self.failures: dict[str, Exception] = {}

    async def call(self, method: Callable[[ActorHandle], Awaitable[None]]) -> None:
        """Call all of them at once; drop those that fail or do not answer in time."""
        names = list(self._workers)
        answers = await asyncio.gather(
            *(asyncio.wait_for(method(self._workers[name]), self._timeout_s) for name in names), return_exceptions=True
        )
        for name, answer in zip(names, answers, strict=True):
            if isinstance(answer, Exception):
                del self._workers[name]
                self.failures[name] = answer


async def _exhaust(stream: Callable[[], ObjectRef]) -> None:
    async for _ in stream:
        pass
