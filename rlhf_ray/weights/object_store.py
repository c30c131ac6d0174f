"""Weights through Ray's object store: works on any hardware and between any nodes.

Invariants: the driver handles references, never weights; at most three buckets live in the object store (two that the
learner may pack ahead, one that is being loaded); a worker that fails is left out of the rest and does not hold up the
others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from ray import ObjectRefGenerator
from ray.actor import ActorHandle

from rlhf_ray.config.rollout import WeightChannelConfig
from rlhf_ray.runtime.actor_calls import call_all
from rlhf_ray.types import PolicyVersion
from rlhf_ray.weights.channel import PublishingLearner

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
        """See `WeightChannel.send`; a worker has `timeout_s` for every bucket."""
        receivers = _Receivers(workers, self._timeout_s)
        streams = [
            rank.weight_buckets.options(num_returns="streaming", _generator_backpressure_num_objects=_AHEAD).remote(
                self._bucket_bytes
            )
            for rank in learner.ranks
        ]
        await receivers.call(lambda worker: worker.start_weight_update.remote())
        # The other ranks yield nothing, but under sharding rank 0 waits for them at every gathering.
        await asyncio.gather(_forward(streams[0], receivers), *(_exhaust(stream) for stream in streams[1:]))
        await receivers.call(lambda worker: worker.finish_weight_update.remote(version))
        return receivers.failures


class _Receivers:
    """The workers that still follow."""

    def __init__(self, workers: Mapping[str, ActorHandle], timeout_s: float) -> None:
        self._workers = dict(workers)
        self._timeout_s = timeout_s
        self.failures: dict[str, Exception] = {}

    async def call(self, method: Callable[[ActorHandle], Awaitable[None]]) -> bool:
        """Call all of them at once; drop those that fail or do not answer in time. Whether all are still there."""
        answers = await call_all(self._workers, method, self._timeout_s)
        failures = {name: answer for name, answer in answers.items() if isinstance(answer, Exception)}
        self._workers = {name: worker for name, worker in self._workers.items() if name not in failures}
        self.failures |= failures
        return not failures


async def _forward(stream: ObjectRefGenerator, receivers: _Receivers) -> None:
    async for bucket in stream:
        if not await receivers.call(lambda worker, bucket=bucket: worker.update_weights.remote(bucket)):
            # A learner that failed ends its stream with a bucket that is its error: fetching raises it here.
            await bucket


async def _exhaust(stream: ObjectRefGenerator) -> None:
    async for error in stream:
        await error
