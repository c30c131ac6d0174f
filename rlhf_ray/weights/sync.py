"""`WeightSynchronizer`: brings new weights to all workers and decides which of them may generate with these.

Invariants: weights change only while no request is in flight, and new requests wait meanwhile. From the start of an update until
it is complete and the probe has agreed, a worker is STALE; it stays STALE if the update is interrupted.

The probe: after each update, worker and learner compute the log-probabilities of the same random sequence and must agree.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import numpy as np
from ray.actor import ActorHandle

from rlhf_ray.config.rollout import RolloutConfig
from rlhf_ray.rollout.dispatch import WORKER_LOST, Dispatcher
from rlhf_ray.rollout.requests import EngineBusy, NoWorkerLeft
from rlhf_ray.rollout.workers import WorkerHandle, WorkerSet, call_all, describe
from rlhf_ray.types import PolicyVersion
from rlhf_ray.weights.channel import ObjectStoreChannel, WeightChannel, WeightSender
from rlhf_ray.weights.native import NativeChannel

Actors = Mapping[str, ActorHandle]
"""Rollout workers by name."""

Send = Callable[[Actors], Awaitable[dict[str, Exception]]]
"""Brings weights to workers; returns the error of each worker that failed."""

Verify = Callable[[Actors], Awaitable[dict[str, Exception | str | None]]]
"""Checks workers after an update; returns what is wrong with each, or None."""


def make_channel(config: RolloutConfig) -> WeightChannel:
    """The channel that `config.weights.kind` names."""
    kind = config.weights.kind
    return ObjectStoreChannel(config.weights) if kind == "object_store" else NativeChannel(config, kind)


class WeightSynchronizer:
    """Updates the weights of a pool's workers."""

    def __init__(
        self, config: RolloutConfig, worker_set: WorkerSet, dispatcher: Dispatcher, channel: WeightChannel
    ) -> None:
        self._config = config
        self._worker_set = worker_set
        self._dispatcher = dispatcher
        self._channel = channel
        self._updating = False

    async def sync_weights(self, version: PolicyVersion, learner: WeightSender) -> list[str]:
        """See `RolloutPool.sync_weights`."""

        async def send(actors: Actors) -> dict[str, Exception]:
            return await self._channel.send(learner, actors, version)

        async def verify(actors: Actors) -> dict[str, Exception | str | None]:
            return await self._probe(version, learner, actors)

        return await self._update(version, send, verify)

    async def load_folder(self, path: str, version: PolicyVersion) -> list[str]:
        """See `RolloutPool.load_folder`."""

        async def send(actors: Actors) -> dict[str, Exception]:
            answers = await self._call(actors, lambda actor: actor.load_folder.remote(path, version))
            return {name: answer for name, answer in answers.items() if isinstance(answer, Exception)}

        async def verify(actors: Actors) -> dict[str, Exception | str | None]:
            return dict.fromkeys(actors)  # each worker read the files itself: there is no learner to compare with

        return await self._update(version, send, verify)

    async def _update(self, version: PolicyVersion, send: Send, verify: Verify) -> list[str]:
        self._check_idle()
        self._updating = True
        self._dispatcher.pause()
        workers = self._worker_set.alive
        for worker in workers:
            self._worker_set.update_begun(worker)
        try:
            actors = {worker.name: worker.actor for worker in workers}
            failures = await send(actors)
            problems = await verify({name: actor for name, actor in actors.items() if name not in failures})
            for worker in workers:
                self._conclude(worker, version, failures.get(worker.name) or problems.get(worker.name))
        except Exception as error:
            for worker in workers:
                self._worker_set.rejected(worker, f"the update to policy {version} failed: {describe(error)}")
            raise
        finally:
            self._updating = False
            self._dispatcher.resume()
        confirmed = [name for name, problem in problems.items() if problem is None]
        if not confirmed:
            raise NoWorkerLeft(f"no rollout worker has policy {version}: {self._worker_set}")
        return confirmed

    def _check_idle(self) -> None:
        if self._updating:
            raise EngineBusy("another weight update is running; wait for it before the next")
        if self._dispatcher.in_flight:
            raise EngineBusy(
                f"{self._dispatcher.in_flight} requests are being generated; weights can change only when none is. "
                "Wait for the running `generate` calls to end"
            )

    async def _probe(
        self, version: PolicyVersion, learner: WeightSender, actors: Actors
    ) -> dict[str, Exception | str | None]:
        tokens = probe_sequence(self._config.weights.probe_tokens, self._worker_set.vocabulary, version)
        expected = await learner.probe_logprobs(tokens)
        answers = await self._call(actors, lambda actor: actor.probe.remote(tokens))
        return {
            name: answer if isinstance(answer, Exception) else disagreement(expected, answer, self._config)
            for name, answer in answers.items()
        }

    def _conclude(self, worker: WorkerHandle, version: PolicyVersion, problem: Exception | str | None) -> None:
        if problem is None:
            self._worker_set.confirmed(worker, f"{worker.name} has policy {version}")
        elif isinstance(problem, WORKER_LOST):
            self._worker_set.lost(worker, problem)
        elif isinstance(problem, TimeoutError):
            timeout = self._config.weights.timeout_s
            self._worker_set.rejected(worker, f"it did not answer within {timeout:g} s (rollout.weights.timeout_s)")
        else:
            self._worker_set.rejected(worker, problem if isinstance(problem, str) else describe(problem))

    async def _call(self, actors: Actors, method: Callable[[ActorHandle], Awaitable[Any]]) -> dict[str, Any]:
        return await call_all(actors, method, self._config.weights.timeout_s)


def probe_sequence(length: int, vocabulary: int, version: PolicyVersion) -> np.ndarray:
    """int32 [length]: random tokens that differ for each version, so that over time every embedding is compared."""
    return np.random.default_rng(version).integers(0, vocabulary, length, dtype=np.int32)


def disagreement(learner: np.ndarray, worker: np.ndarray, config: RolloutConfig) -> str | None:
    """What is wrong with a worker's log-probabilities on the probe; None if they agree with the learner's.

    Args:
        learner: float32 [T−1], nats, at temperature 1.
        worker: the same of the rollout worker.
        config: its dtype decides what is compared: in fp32 the largest |Δ|, in bf16, where single tokens differ more, the mean.
    """
    if learner.shape != worker.shape:
        return f"the learner gave {learner.shape[0]} log-probabilities on the probe and the worker {worker.shape[0]}"
    differences = np.abs(learner.astype(np.float64) - worker)
    measure, value = ("max", differences.max()) if config.dtype == "float32" else ("mean", differences.mean())
    tolerance = config.weights.probe_tolerance
    if value <= tolerance:  # False for NaN
        return None
    return (
        f"its log-probabilities on the probe differ from the learner's by {measure} |Δ| = {value:.3g} nats, "
        f"allowed: {tolerance:g} (rollout.weights.probe_tolerance)"
    )
