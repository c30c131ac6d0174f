"""Bringing new weights to all workers and deciding who may be used with them.

Invariants: weights change only while nothing is in flight, and what is asked for meanwhile waits; from the first byte
of an update until it is complete and its probe has passed, a worker is STALE. An update that is cut off, whoever cuts
it, leaves it so.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

import numpy as np
from ray.actor import ActorHandle

from rlhf_ray.config.rollout import RolloutConfig
from rlhf_ray.rollout.dispatch import WORKER_LOST, Dispatcher
from rlhf_ray.rollout.requests import EngineBusy, NoWorkerLeft
from rlhf_ray.rollout.workers import Member, WorkerSet
from rlhf_ray.runtime.actor_calls import call_all, describe
from rlhf_ray.types import PolicyVersion
from rlhf_ray.weights.channel import PublishingLearner, WeightChannel
from rlhf_ray.weights.native import NativeChannel
from rlhf_ray.weights.object_store import ObjectStoreChannel


def make_channel(config: RolloutConfig) -> WeightChannel:
    """The channel of `config.weights.kind`."""
    if config.weights.kind == "object_store":
        return ObjectStoreChannel(config.weights)
    return NativeChannel(config)


def probe_sequence(length: int, vocabulary: int, version: PolicyVersion) -> np.ndarray:
    """int32 [length]: random tokens, other ones for each version, so that in time every embedding is looked at."""
    return np.random.default_rng(version).integers(0, vocabulary, length, dtype=np.int32)


def disagreement(learner: np.ndarray, worker: np.ndarray, config: RolloutConfig) -> str | None:
    """None where the worker agrees, else what is wrong.

    Args:
        learner: float32 [T−1], nats, at temperature 1.
        worker: the same of the rollout worker.
        config: its dtype decides what is compared: the largest |Δ| in fp32; in bf16, where tokens scatter, the mean.
    """
    if learner.shape != worker.shape:
        return f"the learner gave {learner.shape[0]} log-probabilities on the probe and the worker {worker.shape[0]}"
    differences = np.abs(learner.astype(np.float64) - worker)
    measure, value = ("max", differences.max()) if config.dtype == "float32" else ("mean", differences.mean())
    tolerance = config.weights.probe_tolerance
    if value <= tolerance:  # false for NaN, too
        return None
    return (
        f"its log-probabilities on the probe differ from the learner's by {measure} |Δ| = {value:.3g} nats, "
        f"allowed: {tolerance:g} (rollout.weights.probe_tolerance)"
    )


Send = Callable[[Mapping[str, ActorHandle]], Awaitable[dict[str, Exception]]]
"""Bring the weights to workers by name; returns why it failed for those where it did."""

Judge = Callable[[Mapping[str, ActorHandle]], Awaitable[dict[str, Exception | str | None]]]
"""What is wrong with each worker after an update; None where nothing is."""


class WeightSynchronizer:
    """Updates the weights of a worker_set's members."""

    def __init__(
        self, config: RolloutConfig, worker_set: WorkerSet, dispatcher: Dispatcher, channel: WeightChannel
    ) -> None:
        self._config = config
        self._worker_set = worker_set
        self._dispatcher = dispatcher
        self._channel = channel
        self._updating = False

    async def sync_weights(self, version: PolicyVersion, learner: PublishingLearner) -> list[str]:
        """See `RolloutPool.sync_weights`."""

        async def send(workers: Mapping[str, ActorHandle]) -> dict[str, Exception]:
            return await self._channel.send(learner, workers, version)

        async def judge(workers: Mapping[str, ActorHandle]) -> dict[str, Exception | str | None]:
            return await self._probe(version, learner, workers)

        return await self._update(version, send, judge)

    async def load_folder(self, path: str, version: PolicyVersion) -> list[str]:
        """See `RolloutPool.load_folder`."""

        async def send(workers: Mapping[str, ActorHandle]) -> dict[str, Exception]:
            answers = await self._call(workers, lambda worker: worker.load_folder.remote(path, version))
            return {name: answer for name, answer in answers.items() if isinstance(answer, Exception)}

        async def judge(workers: Mapping[str, ActorHandle]) -> dict[str, Exception | str | None]:
            return dict.fromkeys(workers)  # each worker read the files itself: nobody knows better than they

        return await self._update(version, send, judge)

    async def _update(self, version: PolicyVersion, send: Send, judge: Judge) -> list[str]:
        self._check_idle()
        self._updating = True
        self._dispatcher.pause()
        members = {member.name: member for member in self._worker_set.living}
        for member in members.values():
            self._worker_set.update_begun(member)
        try:
            workers = {name: member.actor for name, member in members.items()}
            failures = await send(workers)
            verdicts = await judge({name: actor for name, actor in workers.items() if name not in failures})
            for name, member in members.items():
                self._conclude(member, version, failures.get(name) or verdicts.get(name))
        except Exception as error:
            for member in members.values():
                self._worker_set.rejected(member, f"the update to policy {version} failed: {describe(error)}")
            raise
        finally:
            self._updating = False
            self._dispatcher.resume()
        confirmed = [name for name in verdicts if verdicts[name] is None]
        if not confirmed:
            raise NoWorkerLeft(f"no rollout worker has policy {version}: {self._worker_set}")
        return confirmed

    def _check_idle(self) -> None:
        if self._updating:
            raise EngineBusy("another weight update is under way; wait for it before the next")
        if self._dispatcher.in_flight:
            raise EngineBusy(
                f"{self._dispatcher.in_flight} requests are being generated; weights can change only when none is. "
                "Wait for the running `generate` calls to end"
            )

    async def _probe(
        self, version: PolicyVersion, learner: PublishingLearner, workers: Mapping[str, ActorHandle]
    ) -> dict[str, Exception | str | None]:
        tokens = probe_sequence(self._config.weights.probe_tokens, self._worker_set.vocabulary, version)
        expected = await learner.probe_logprobs(tokens)
        answers = await self._call(workers, lambda worker: worker.probe.remote(tokens))
        return {
            name: answer if isinstance(answer, Exception) else disagreement(expected, answer, self._config)
            for name, answer in answers.items()
        }

    def _conclude(self, member: Member, version: PolicyVersion, wrong: Exception | str | None) -> None:
        if wrong is None:
            self._worker_set.confirmed(member, f"{member.name} has policy {version}")
        elif isinstance(wrong, WORKER_LOST):
            self._worker_set.lost(member, wrong)
        elif isinstance(wrong, TimeoutError):
            timeout = self._config.weights.timeout_s
            self._worker_set.rejected(member, f"it did not answer within {timeout:g} s (rollout.weights.timeout_s)")
        else:
            self._worker_set.rejected(member, wrong if isinstance(wrong, str) else describe(wrong))

    async def _call(self, workers: Mapping[str, ActorHandle], method: Callable[[ActorHandle], Awaitable]) -> dict:
        return await call_all(workers, method, self._config.weights.timeout_s)
