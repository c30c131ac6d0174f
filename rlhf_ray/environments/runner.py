"""Rollouts from requests: every episode goes on as soon as its own turn is done; none waits for another.

Invariants: each request of a run is answered exactly once, by a rollout or by the `EnvironmentFailed` that ended it; a rollout
is a function of its request, the policy and the environment's class; a response without an environment is an episode of one
turn. Turns that are ready within a moment of each other are sent together, so a turn costs no call of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from rlhf_ray.config.environment import EnvironmentConfig
from rlhf_ray.data.tokenize import encode_prompt
from rlhf_ray.environments.base import Environment, EnvironmentFailed, Message, Step
from rlhf_ray.environments.calls import EnvironmentCalls
from rlhf_ray.environments.episode import Episode, Limits, ObservationTooLong
from rlhf_ray.environments.template import TurnRenderer
from rlhf_ray.types import Rollout, RolloutRequest

GATHER_S = 0.01
"""How long a turn that is ready waits for company; engines hand over what finished every tenth of a second."""
ONLY_TURN = Step(done=True)


class Generator(Protocol):
    """A `RolloutPool`, or whatever samples turns."""

    def generate(self, requests: Sequence[RolloutRequest]) -> AsyncGenerator[Rollout]:
        """A rollout for each request, as they finish."""


class EpisodeRunner:
    """All episodes of a training run."""

    def __init__(
        self, pool: Generator, tokenizer: PreTrainedTokenizerBase, config: EnvironmentConfig | None, context: int
    ) -> None:
        """`context`: most tokens of a prompt and all that follows.

        Raises:
            TemplateRefused: the tokenizer's chat template cannot continue an episode.
            ValueError: there is no such environment.
        """
        self.pool, self.tokenizer, self.context = pool, tokenizer, context
        self.renderer = TurnRenderer(tokenizer)
        self.calls = None if config is None else EnvironmentCalls(config)
        self.limits = Limits.of(config, context)
        if self.limits.turns > 1:
            self.renderer.check()

    async def run(self, requests: Sequence[RolloutRequest]) -> AsyncGenerator[Rollout | EnvironmentFailed]:
        """Yield what became of each request, as they finish. Leave early under `aclosing`, which withdraws the rest.

        Raises:
            PromptRefused, NoWorkerLeft: as the pool.
            TemplateRefused: an answer showed that the template does not continue what it rendered.
        """
        under_way = _UnderWay(self)
        try:
            under_way.begin(requests)
            for _ in requests:
                arrived = await under_way.arrived.get()
                if isinstance(arrived, BaseException) and not isinstance(arrived, EnvironmentFailed):
                    raise arrived
                yield arrived
        finally:
            await under_way.close()


class _UnderWay:
    """The episodes of one `run` and the tasks that drive them."""

    def __init__(self, runner: EpisodeRunner) -> None:
        self.runner = runner
        self.arrived: asyncio.Queue[Rollout | BaseException] = asyncio.Queue()
        self._ready: list[Episode] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, requests: Sequence[RolloutRequest]) -> None:
        """Start all of them."""
        if self.runner.calls is None:
            self._spawn(self._generate([Episode(request) for request in requests]))
        else:
            for request in requests:
                self._spawn(self._reset(self.runner.calls, request))

    async def close(self) -> None:
        """Withdraw what is not finished."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _reset(self, calls: EnvironmentCalls, request: RolloutRequest) -> None:
        environment, said = await calls.reset(request)
        if said:
            request = self._opened(calls, request, said)
        self._go_on(Episode(request, environment, self.runner.renderer.opening(request.prompt.messages)))

    def _opened(self, calls: EnvironmentCalls, request: RolloutRequest, said: tuple[Message, ...]) -> RolloutRequest:
        """The request with what the environment said first in its prompt."""
        messages = (*request.prompt.messages, *said)
        token_ids = encode_prompt(self.runner.tokenizer, messages)
        if len(token_ids) >= self.runner.context:
            reason = f"reset made a prompt of {len(token_ids)} tokens; the context is {self.runner.context}"
            raise EnvironmentFailed(calls.config.factory, reason, request.id)
        return replace(request, prompt=replace(request.prompt, token_ids=token_ids, messages=messages))

    def _go_on(self, episode: Episode) -> None:
        """Send its next turn, with those that are ready in a moment."""
        self._ready.append(episode)
        if len(self._ready) == 1:
            self._spawn(self._send())

    async def _send(self) -> None:
        await asyncio.sleep(GATHER_S)
        ready, self._ready = self._ready, []
        await self._generate(ready)

    async def _generate(self, episodes: Sequence[Episode]) -> None:
        by_id = {episode.request.id: episode for episode in episodes}
        async with aclosing(self.runner.pool.generate([episode.next_request for episode in episodes])) as turns:
            async for turn in turns:
                self._spawn(self._observe(by_id[turn.id], turn))

    async def _observe(self, episode: Episode, sampled: Rollout) -> None:
        runner, step = self.runner, ONLY_TURN
        if runner.calls is not None:
            step = await self._step(runner.calls, episode.environment, sampled)
        try:
            finished = episode.add(sampled, step, runner.renderer, runner.limits)
        except ObservationTooLong as error:
            raise EnvironmentFailed(runner.calls.config.factory, str(error), sampled.id) from error
        if finished is None:
            self._go_on(episode)
        else:
            self.arrived.put_nowait(finished)

    async def _step(self, calls: EnvironmentCalls, environment: Environment, sampled: Rollout) -> Step:
        return await calls.step(environment, self.runner.renderer.text(sampled.token_ids), sampled.id)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.arrived.put_nowait(task.exception())
