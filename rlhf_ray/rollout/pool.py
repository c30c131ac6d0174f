"""`RolloutPool`: all rollout workers of a run as one object for the driver.

Invariants: only READY members generate (see `membership`); a publication reaches every member that lives or marks it STALE;
weights change only while nothing is in flight, and what is asked for meanwhile waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError

from rlhf_ray.config.rollout import RolloutConfig, SamplingConfig
from rlhf_ray.rollout.dispatcher import Call, Dispatcher
from rlhf_ray.rollout.environment import worker_environment
from rlhf_ray.rollout.errors import EngineBusy, NoWorkerLeft
from rlhf_ray.rollout.members import Member, WorkerEvent
from rlhf_ray.rollout.membership import Happening, State
from rlhf_ray.rollout.publication import disagreement, probe_sequence
from rlhf_ray.rollout.samples import SampleRequest, check_prompt
from rlhf_ray.rollout.weights.base import PublishingLearner, WeightChannel
from rlhf_ray.rollout.weights.channels import make_channel
from rlhf_ray.rollout.worker import RolloutWorker
from rlhf_ray.types import PolicyVersion, Rollout, RolloutRequest


class RolloutPool:
    """Generation, publication and health of a set of workers. Belongs to one event loop."""

    def __init__(self, config: RolloutConfig, on_event: Callable[[WorkerEvent], None] = lambda event: None) -> None:
        """
        Args:
            config: of the generation role.
            on_event: told of joins, departures, publications and re-dispatched requests, in the event loop.
        """
        self._config = config
        self._on_event = on_event
        self._context = 0
        self._members: list[Member] = []
        self._channel: WeightChannel = make_channel(config)
        # Somewhat more than an engine runs at a time, so that a finished sequence is replaced without asking the driver.
        capacity = config.max_concurrent + config.max_concurrent // 4
        self._dispatcher = Dispatcher(self._members, capacity, self._lost, self._redispatched)

    @property
    def members(self) -> tuple[Member, ...]:
        """All workers, in the order of their start, dead ones included."""
        return tuple(self._members)

    async def start(
        self, model: str, context: int, version: PolicyVersion, options: Callable[[int], Mapping[str, Any]]
    ) -> None:
        """Start the workers on a Hugging Face folder and wait until all can generate.

        Args:
            model: folder of policy `version`.
            context: most tokens of prompt and response together.
            version: what the folder holds.
            options: Ray actor options of worker i (resources, placement, `runtime_env`).

        Raises:
            ray.exceptions.RayActorError: a worker could not start; the cause is in its message.
        """
        self._context = context
        actor = ray.remote(RolloutWorker)
        for index in range(self._config.workers.count):
            handle = actor.options(**self._with_environment(options(index)), max_restarts=0, max_task_retries=0)
            name = f"rollout-{index}"
            self._members.append(Member(name, handle.remote(model, self._config, context, version)))
        for member, info in zip(self._members, await self._call_all(lambda actor: actor.info.remote()), strict=True):
            if isinstance(info, Exception):
                raise info
            member.info = info
            member.happened(Happening.STARTED)
            self._tell("started", member, f"{member.name} on {info.host} (pid {info.pid}) generates with policy {version}")

    async def generate(
        self, requests: Iterable[RolloutRequest], sampling: SamplingConfig | None = None
    ) -> AsyncIterator[Rollout]:
        """Yield a rollout for each request, as they finish. Calls may overlap; leaving early withdraws the rest.

        Args:
            requests: with different ids.
            sampling: instead of the configured one.

        Raises:
            PromptRefused: a prompt does not fit; nothing was sent.
            NoWorkerLeft: every worker is dead or unconfirmed.
        """
        requests = list(requests)
        for request in requests:
            check_prompt(SampleRequest.of(request), self._context)
        async for rollout in self._dispatcher.run(Call(requests, sampling or self._config.sampling)):
            yield rollout

    async def publish(self, version: PolicyVersion, learner: PublishingLearner) -> list[str]:
        """Bring the learner's weights to every living worker, and use those that then agree with the learner on a probe.

        Returns:
            Names of the confirmed workers.

        Raises:
            EngineBusy: requests are in flight.
            NoWorkerLeft: no worker was confirmed.
            Exception: the learner failed; all workers are STALE.
        """
        tokens = probe_sequence(self._config.weights.probe_tokens, self._vocabulary, version)

        async def update(workers: Mapping[str, ray.actor.ActorHandle]) -> dict[str, Exception]:
            return await self._channel.send(learner, workers, version)

        async def expected() -> np.ndarray:
            return await learner.probe_logprobs(tokens)

        return await self._update(version, update, tokens, expected)

    async def load_folder(self, path: str, version: PolicyVersion) -> list[str]:
        """Let every living worker take over a Hugging Face folder of the same architecture; they must agree with the first.

        Returns, raises: as `publish`.
        """
        tokens = probe_sequence(self._config.weights.probe_tokens, self._vocabulary, version)
        names: list[str] = []

        async def update(workers: Mapping[str, ray.actor.ActorHandle]) -> dict[str, Exception]:
            names.extend(workers)
            answers = await self._call(workers, lambda actor: actor.load_folder.remote(path, version))
            return {name: answer for name, answer in answers.items() if isinstance(answer, Exception)}

        return await self._update(version, update, tokens, None)
