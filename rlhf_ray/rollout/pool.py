"""`RolloutPool`: all rollout workers of a run as one object for the driver.

Invariants: only READY members generate (see `membership`); a publication reaches every living member or leaves it
STALE.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import aclosing
from typing import Any

import ray

from rlhf_ray.config.learner import LoraConfig
from rlhf_ray.config.rollout import RolloutConfig, SamplingConfig
from rlhf_ray.rollout.dispatch import Call, Dispatcher
from rlhf_ray.rollout.requests import SampleRequest, check_prompt
from rlhf_ray.rollout.worker import RolloutWorker
from rlhf_ray.rollout.workers import Member, WorkerEvent, WorkerSet
from rlhf_ray.runtime.actor_calls import call_all
from rlhf_ray.runtime.process_environment import worker_environment
from rlhf_ray.types import PolicyVersion, Rollout, RolloutRequest
from rlhf_ray.weights.channel import PublishingLearner
from rlhf_ray.weights.sync import WeightSynchronizer, make_channel

ActorOptions = Callable[[int], Mapping[str, Any]]
"""Ray actor options of worker i: resources, placement, `runtime_env`."""

_START_TIMEOUT_S = 1800.0
_HEALTH_TIMEOUT_S = 60.0
_CLOSE_TIMEOUT_S = 10.0


class RolloutPool:
    """Generation, publication and health of a set of workers. Belongs to one event loop."""

    def __init__(
        self,
        config: RolloutConfig,
        on_event: Callable[[WorkerEvent], None] = lambda event: None,
        lora: LoraConfig | None = None,
    ) -> None:
        """
        Args:
            config: of the generation role.
            on_event: told, in the event loop, of every start, confirmation, rejection, loss and re-dispatch.
            lora: of the learner; read where `config.weights.lora` is `adapter`.
        """
        self._config = config
        self._lora = lora if config.weights.lora == "adapter" else None
        self._context = 0
        self._worker_set = WorkerSet(on_event)
        # More than an engine runs at a time, so that a finished sequence is replaced without asking the driver.
        capacity = config.max_concurrent + config.max_concurrent // 4
        self._dispatcher = Dispatcher(self._worker_set.members, capacity, self._worker_set.lost)
        self._synchronizer = WeightSynchronizer(config, self._worker_set, self._dispatcher, make_channel(config))

    @property
    def members(self) -> tuple[Member, ...]:
        """All workers in the order of their start, dead ones included."""
        return tuple(self._worker_set.members)

    async def start(self, model: str, context: int, version: PolicyVersion, options: ActorOptions) -> None:
        """Start the workers and wait until all can generate.

        Args:
            model: Hugging Face folder that holds policy `version`.
            context: most tokens of prompt and response together.
            version: what the folder holds.
            options: where each worker runs and with what.

        Raises:
            ray.exceptions.RayActorError: a worker could not start; its message has the cause.
        """
        self._context = context
        actor = ray.remote(RolloutWorker)
        for index in range(self._config.workers.count):
            remote = actor.options(**self._with_environment(options(index)), max_restarts=0, max_task_retries=0)
            handle = remote.remote(model, self._config, context, version, self._lora)
            self._worker_set.members.append(Member(f"rollout-{index}", handle))
        actors = {member.name: member.actor for member in self._worker_set.members}
        answers = await call_all(actors, lambda worker: worker.info.remote(), _START_TIMEOUT_S)
        for member, info in zip(self._worker_set.members, answers.values(), strict=True):
            if isinstance(info, Exception):
                raise info
            member.info = info
            self._worker_set.started(member, f"{member.name} runs policy {version} on {info.host}, pid {info.pid}")

    async def generate(
        self, requests: Iterable[RolloutRequest], sampling: SamplingConfig | None = None
    ) -> AsyncGenerator[Rollout]:
        """Yield a rollout for each request, as they finish. Calls may overlap.

        Whoever may leave early does so under `contextlib.aclosing`, which withdraws the rest.

        Args:
            requests: with different ids.
            sampling: instead of the configured one.

        Raises:
            PromptRefused: a prompt does not fit; nothing was sent.
            NoWorkerLeft: every worker is dead or unconfirmed.
        """
        requests = list(requests)
        for request in requests:
            check_prompt(SampleRequest.of(request), self._context, self._worker_set.vocabulary)
        async with aclosing(self._dispatcher.run(Call(requests, sampling or self._config.sampling))) as rollouts:
            async for rollout in rollouts:
                yield rollout

    async def sync_weights(self, version: PolicyVersion, learner: PublishingLearner) -> list[str]:
        """Bring the learner's weights to every living worker; use those that then agree with the learner on a probe.

        Returns:
            Names of the workers that are used from here on.

        Raises:
            EngineBusy: requests are in flight, or another update is under way.
            NoWorkerLeft: no worker agreed.
            Exception: the learner failed; all workers are STALE.
        """
        return await self._synchronizer.sync_weights(version, learner)

    async def load_folder(self, path: str, version: PolicyVersion) -> list[str]:
        """Let every living worker read a Hugging Face folder of the same architecture, as policy `version`.

        Returns, raises: as `sync_weights`.
        """
        return await self._synchronizer.load_folder(path, version)

    async def health(self) -> dict[str, Exception | None]:
        """For each living worker, what is wrong with it: a forward pass was asked of its engine."""
        workers = {member.name: member.actor for member in self._worker_set.living}
        answers = await call_all(workers, lambda worker: worker.health.remote(), _HEALTH_TIMEOUT_S)
        return {name: answer if isinstance(answer, Exception) else None for name, answer in answers.items()}

    async def close(self) -> None:
        """End the workers: first their engines, so that shared memory is given back, then their processes."""
        living = {member.name: member.actor for member in self._worker_set.living}
        await call_all(living, lambda worker: worker.close.remote(), _CLOSE_TIMEOUT_S)
        for member in self._worker_set.members:
            ray.kill(member.actor)

    def _with_environment(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The caller's options, with the environment that vLLM needs where the caller does not say otherwise."""
        runtime_env = options.get("runtime_env", {})
        env_vars = worker_environment(self._config, runtime_env.get("env_vars", {}))
        return {**options, "runtime_env": {**runtime_env, "env_vars": env_vars}}
