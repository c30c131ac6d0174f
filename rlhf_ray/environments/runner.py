"""`EpisodeRunner`: plays the episodes of many requests at the same time; no episode waits for another.

Invariants: every request of a `run` is answered exactly once, by a rollout or by the `EnvironmentFailed` that ended its
episode; a rollout depends only on its request, the policy and the environment's class. Turns that become ready at about the
same time are sent to the pool in one call.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from rlhf_ray.config.rollout import EnvironmentConfig
from rlhf_ray.data.tokenize import encode_prompt
from rlhf_ray.environments.base import EnvironmentFailed, Message
from rlhf_ray.environments.calls import EnvironmentCalls
from rlhf_ray.environments.episode import Episode, Limits, ObservationTooLong
from rlhf_ray.environments.template import TurnRenderer
from rlhf_ray.types import Rollout, RolloutRequest

GATHER_S = 0.01
"""How long a ready turn waits for others, so that they share a call; engines hand over what finished every 0.1 s."""


class TurnGenerator(Protocol):
    """What the runner needs of a `RolloutPool`."""

    def generate(self, requests: Sequence[RolloutRequest]) -> AsyncGenerator[Rollout]:
        """A rollout for each request, as they finish."""


class EpisodeRunner:
    """Plays episodes of the configured environment."""

    def __init__(
        self, pool: TurnGenerator, tokenizer: PreTrainedTokenizerBase, config: EnvironmentConfig, context: int
    ) -> None:
        """`context`: maximum number of tokens of a prompt and everything after it.

        Raises:
            TemplateRefused: the tokenizer's chat template cannot continue a conversation.
            ValueError: there is no such environment.
        """
        self.pool, self.tokenizer, self.context = pool, tokenizer, context
        self.renderer = TurnRenderer(tokenizer)
        self.calls = EnvironmentCalls(config)
        self.limits = Limits.of(config, context)
        if self.limits.turns > 1:
            self.renderer.check()

    async def run(self, requests: Sequence[RolloutRequest]) -> AsyncGenerator[Rollout | EnvironmentFailed]:
        """Yield a rollout or an error for each request, as they finish. To leave early, use `aclosing`: it cancels the rest.

        Raises:
            PromptRefused, NoWorkerLeft: raised by the pool.
            TemplateRefused: the chat template changed the conversation when an observation was added.
        """
        running = _RunningEpisodes(self)
        try:
            running.start(requests)
            for _ in requests:
                result = await running.results.get()
                if isinstance(result, BaseException) and not isinstance(result, EnvironmentFailed):
                    raise result
                yield result
        finally:
            await running.close()


class _RunningEpisodes:
    """The episodes of one `run` and their tasks."""

    def __init__(self, runner: EpisodeRunner) -> None:
        self.runner = runner
        self.results: asyncio.Queue[Rollout | BaseException] = asyncio.Queue()
        self._ready: list[Episode] = []
        """Episodes that wait for their next turn to be sent."""
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, requests: Sequence[RolloutRequest]) -> None:
        """Start an episode for each request."""
        for request in requests:
            self._spawn(self._reset(request))

    async def close(self) -> None:
        """Cancel the episodes that have not finished."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _reset(self, request: RolloutRequest) -> None:
        environment, opening = await self.runner.calls.reset(request)
        if opening:
            request = self._with_opening(request, opening)
        self._queue_turn(Episode(request, environment, self.runner.renderer.opening(request.prompt.messages)))

    def _with_opening(self, request: RolloutRequest, opening: tuple[Message, ...]) -> RolloutRequest:
        """The request with the environment's first messages appended to its prompt."""
        runner, messages = self.runner, (*request.prompt.messages, *opening)
        token_ids = encode_prompt(runner.tokenizer, messages)
        if len(token_ids) >= runner.context:
            reason = f"reset made a prompt of {len(token_ids)} tokens; the context is {runner.context}"
            raise EnvironmentFailed(runner.calls.config.factory, reason, request.id)
        return replace(request, prompt=replace(request.prompt, token_ids=token_ids, messages=messages))

    def _queue_turn(self, episode: Episode) -> None:
        """Send the episode's next turn soon, together with others that become ready meanwhile."""
        self._ready.append(episode)
        if len(self._ready) == 1:
            self._spawn(self._send_turns())

    async def _send_turns(self) -> None:
        await asyncio.sleep(GATHER_S)
        ready, self._ready = self._ready, []
        by_id = {episode.request.id: episode for episode in ready}
        async with aclosing(self.runner.pool.generate([episode.next_request for episode in ready])) as turns:
            async for turn in turns:
                self._spawn(self._step(by_id[turn.id], turn))

    async def _step(self, episode: Episode, sampled: Rollout) -> None:
        """Let the environment answer a turn; then queue the next turn or hand over the finished rollout."""
        runner = self.runner
        step = await runner.calls.step(episode.environment, runner.renderer.text(sampled.token_ids), sampled.id)
        try:
            finished = episode.add(sampled, step, runner.renderer, runner.limits)
        except ObservationTooLong as error:
            raise EnvironmentFailed(runner.calls.config.factory, str(error), sampled.id) from error
        if finished is None:
            self._queue_turn(episode)
        else:
            self.results.put_nowait(finished)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.results.put_nowait(error)
