"""`RolloutPool`: all rollout workers of a run as one object for the driver.

Invariant: only READY workers generate (see `workers`).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

import ray

from rlhf_ray.config.learner import LoraConfig
from rlhf_ray.config.rollout import RolloutConfig, SamplingConfig
from rlhf_ray.rollout.dispatch import Call, Dispatcher
from rlhf_ray.rollout.requests import check_prompt
from rlhf_ray.rollout.worker import RolloutWorker, worker_environment
from rlhf_ray.rollout.workers import WorkerEvent, WorkerHandle, WorkerSet, call_all
from rlhf_ray.types import PolicyVersion, Rollout, RolloutRequest
from rlhf_ray.weights.channel import WeightSender
from rlhf_ray.weights.sync import WeightSynchronizer, make_channel

ActorOptions = Callable[[int], Mapping[str, Any]]
"""Ray actor options of worker i: resources, placement, `runtime_env`."""

_START_TIMEOUT_S = 1800.0
_CLOSE_TIMEOUT_S = 10.0


class RolloutPool:
    """Starts workers, generates with them and updates their weights. Belongs to one event loop."""

    def __init__(
        self,
        config: RolloutConfig,
        on_event: Callable[[WorkerEvent], None] = lambda event: None,
        lora: LoraConfig | None = None,
    ) -> None:
        """
        Args:
            config: the section `rollout`.
            on_event: called, in the event loop, for every change of a worker.
            lora: the learner's adapters; used if `config.weights.lora` is `adapter`.
        """
        self._config = config
        self._lora = lora if config.weights.lora == "adapter" else None
        self._context = 0
        self._worker_set = WorkerSet(on_event)
        # More than an engine runs at a time, so that a finished sequence is replaced without asking the driver.
        capacity = config.max_concurrent + config.max_concurrent // 4
        self._dispatcher = Dispatcher(self._worker_set.workers, capacity, self._worker_set.lost)
        self._synchronizer = WeightSynchronizer(config, self._worker_set, self._dispatcher, make_channel(config))

    @property
    def workers(self) -> tuple[WorkerHandle, ...]:
        """All workers in the order of their start, including dead ones."""
        return tuple(self._worker_set.workers)

    async def start(self, model: str, context: int, version: PolicyVersion, options: ActorOptions) -> None:
        """Start the workers and wait until all can generate.

        Args:
            model: Hugging Face folder with the weights of policy `version`.
            context: maximum number of tokens of prompt and response together.
            version: version of the policy in `model`.
            options: Ray options of each worker.

        Raises:
            ray.exceptions.RayActorError: a worker could not start; the message has the cause.
        """
        self._context = context
        actor = ray.remote(RolloutWorker)
        for index in range(self._config.workers.count):
            remote = actor.options(**self._with_environment(options(index)), max_restarts=0, max_task_retries=0)
            handle = remote.remote(model, self._config, context, version, self._lora)
            self._worker_set.workers.append(WorkerHandle(f"rollout-{index}", handle))
        actors = {worker.name: worker.actor for worker in self.workers}
        answers = await call_all(actors, lambda actor: actor.info.remote(), _START_TIMEOUT_S)
        for worker, info in zip(self.workers, answers.values(), strict=True):
            if isinstance(info, Exception):
                raise info
            message = f"{worker.name} runs policy {version} on {info.host}, pid {info.pid}"
            self._worker_set.started(worker, info, message)

    def generate(
        self, requests: Sequence[RolloutRequest], sampling: SamplingConfig | None = None
    ) -> AsyncGenerator[Rollout]:
        """A rollout for each request, as they finish. Calls may overlap.

        To leave early, use `contextlib.aclosing`, which cancels the remaining requests.

        Args:
            requests: requests with different ids.
            sampling: used instead of the configured sampling.

        Raises:
            PromptRefused: a prompt does not fit; nothing was sent.
            NoWorkerLeft: every worker is DEAD or STALE.
        """
        for request in requests:
            check_prompt(request.id, request.prompt.token_ids, self._context, self._worker_set.vocabulary)
        return self._dispatcher.run(Call(requests, sampling or self._config.sampling))

    async def sync_weights(self, version: PolicyVersion, learner: WeightSender) -> list[str]:
        """Send the learner's weights to every living worker; use those that then agree with the learner on a probe.

        Returns:
            Names of the workers that are READY.

        Raises:
            EngineBusy: requests are in flight, or another update is running.
            NoWorkerLeft: no worker agreed.
            Exception: the learner failed; all workers are STALE.
        """
        return await self._synchronizer.sync_weights(version, learner)

    async def load_folder(self, path: str, version: PolicyVersion) -> list[str]:
        """Let every living worker load the weights of a Hugging Face folder of the same architecture, as policy `version`.

        Returns and raises the same as `sync_weights`.
        """
        return await self._synchronizer.load_folder(path, version)

    async def close(self) -> None:
        """Stop the workers: first their engines, so that shared memory is given back, then their processes."""
        actors = {worker.name: worker.actor for worker in self._worker_set.alive}
        await call_all(actors, lambda actor: actor.close.remote(), _CLOSE_TIMEOUT_S)
        for worker in self.workers:
            ray.kill(worker.actor)

    def _with_environment(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The caller's options plus the environment variables that vLLM needs; the caller's variables win."""
        runtime_env = options.get("runtime_env", {})
        env_vars = worker_environment(self._config, runtime_env.get("env_vars", {}))
        return {**options, "runtime_env": {**runtime_env, "env_vars": env_vars}}
