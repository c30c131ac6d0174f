"""Weight channels: what brings a policy's weights from the learner to the rollout workers, and the default one.

A channel starts an update on each worker, sends every weight, and ends the update with the policy's version. Whether a worker
may be used afterwards is not its decision: `weights.sync` compares log-probabilities on a probe sequence.

Invariants of `ObjectStoreChannel`, which works on any hardware and between any nodes: the driver handles references and never
weights; at most three buckets are in Ray's object store (two that the learner packs ahead, one that is being loaded); a worker
that fails is left out of the rest of the update and does not delay the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from ray import ObjectRef, ObjectRefGenerator
from ray.actor import ActorHandle

from rlhf_ray.config.rollout import WeightChannelConfig
from rlhf_ray.rollout.workers import call_all
from rlhf_ray.types import PolicyVersion

_AHEAD = 2
"""Buckets that the learner packs before one is fetched: one travels while the next is packed."""


class WeightSender(Protocol):
    """A group of learners that can send its weights.

    Each rank is an actor with `weight_buckets(bucket_bytes)`: a generator that yields `WeightBucket`s on rank 0; the other
    ranks only take part in gathering the weights and yield nothing. vLLM's own transfer engines need `rendezvous()` on rank 0,
    and `connect_weight_transfer(plan)` and `send_weights(version)` on every rank (see `weights.native`).
    """

    @property
    def ranks(self) -> Sequence[ActorHandle]:
        """The group's actors, rank 0 first."""

    async def probe_logprobs(self, token_ids: np.ndarray) -> np.ndarray:
        """float32 [T−1], nats, at temperature 1: log-probabilities of tokens 1… of one sequence."""


class WeightChannel(Protocol):
    """One way to transfer weights."""

    async def send(
        self, learner: WeightSender, workers: Mapping[str, ActorHandle], version: PolicyVersion
    ) -> dict[str, Exception]:
        """Bring the learner's weights to the workers.

        Args:
            learner: sends its weights.
            workers: rollout workers by name.
            version: version of the policy that is sent.

        Returns:
            The error of each worker that failed, by name; the other workers have all new weights.

        Raises:
            Exception: the learner failed; no worker has a known policy.
        """


class ObjectStoreChannel:
    """Streams buckets from rank 0 of the learner to all workers at once, through Ray's object store."""

    def __init__(self, config: WeightChannelConfig) -> None:
        self._bucket_bytes = int(config.bucket_mb * (1 << 20))
        self._timeout_s = config.timeout_s

    async def send(
        self, learner: WeightSender, workers: Mapping[str, ActorHandle], version: PolicyVersion
    ) -> dict[str, Exception]:
        """See `WeightChannel.send`; a worker has `timeout_s` for each bucket."""
        receivers = _Receivers(workers, self._timeout_s)
        streams = [
            rank.weight_buckets.options(num_returns="streaming", _generator_backpressure_num_objects=_AHEAD).remote(
                self._bucket_bytes
            )
            for rank in learner.ranks
        ]
        await receivers.call(lambda worker: worker.start_weight_update.remote())
        # The other ranks yield nothing, but with sharded weights rank 0 waits for them at every gathering.
        await asyncio.gather(_forward(streams[0], receivers), *(_exhaust(stream) for stream in streams[1:]))
        await receivers.call(lambda worker: worker.finish_weight_update.remote(version))
        return receivers.failures


class _Receivers:
    """The workers that have not failed in this update."""

    def __init__(self, workers: Mapping[str, ActorHandle], timeout_s: float) -> None:
        self._workers = dict(workers)
        self._timeout_s = timeout_s
        self.failures: dict[str, Exception] = {}

    async def call(self, method: Callable[[ActorHandle], Awaitable[None]]) -> bool:
        """Call all workers at once and leave out those that fail or time out. Returns whether none did."""
        answers = await call_all(self._workers, method, self._timeout_s)
        failures = {name: answer for name, answer in answers.items() if isinstance(answer, Exception)}
        self._workers = {name: worker for name, worker in self._workers.items() if name not in failures}
        self.failures |= failures
        return not failures


async def _forward(stream: ObjectRefGenerator, receivers: _Receivers) -> None:
    async for bucket in stream:

        def load(worker: ActorHandle, bucket: ObjectRef = bucket) -> Awaitable[None]:
            return worker.update_weights.remote(bucket)

        if not await receivers.call(load):
            # If the learner failed, the last bucket of its stream is its error: fetching the bucket raises it here.
            await bucket


async def _exhaust(stream: ObjectRefGenerator) -> None:
    async for error in stream:
        await error
