"""From prompts to experiences: which prompts are sampled, and the coroutine that generates and scores their rollouts.

Invariants: the k-th group of a run has the same prompt, id and seeds in every attempt at the run; an epoch visits every prompt
once, in an order that the run's seed decides. A group is trained whole, or dropped with a reason in the ledger.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Literal, Protocol

import numpy as np

from rlhf_ray.config.ppo import PpoConfig
from rlhf_ray.driver.buffer import Admission, ExperienceBuffer, TokenBatcher
from rlhf_ray.driver.run_logger import RunLogger
from rlhf_ray.driver.training_batch import shaped_scores
from rlhf_ray.environments.base import EnvironmentFailed
from rlhf_ray.rewards.answers import RewardError
from rlhf_ray.runtime.stopping import StopRequest
from rlhf_ray.types import Experience, Prompt, Rollout, RolloutRequest, Score, rollout_seed


class PromptSource:
    """An endless, addressable sequence of groups of requests. It has no state."""

    def __init__(self, prompts: Sequence[Prompt], run: str, seed: int, samples_per_prompt: int) -> None:
        if not prompts:
            raise ValueError("there are no prompts to sample; see data.prompts and data.max_prompt_tokens")
        self.prompts, self.run, self.seed, self.samples_per_prompt = prompts, run, seed, samples_per_prompt
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, dtype=np.int64))

    def group(self, index: int) -> list[RolloutRequest]:
        """The requests of group `index` (from 0): all samples of one prompt."""
        epoch, position = divmod(index, len(self.prompts))
        prompt = self.prompts[int(self._permutation(epoch)[position])]
        prompt = replace(prompt, id=f"{epoch}/{prompt.id}")
        return [
            RolloutRequest(prompt, sample, rollout_seed(f"{self.run}:{self.seed}", prompt.id, sample))
            for sample in range(self.samples_per_prompt)
        ]

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.prompts)))
        return self._order[1]


class RolloutWorkers(Protocol):
    """What the stream needs of `Roles`."""

    def generate(self, requests: Sequence[RolloutRequest]) -> AsyncGenerator[Rollout | EnvironmentFailed]:
        """A rollout or an error for each request, as they finish."""

    async def score(self, rollouts: Sequence[Rollout]) -> list[Score | RewardError]:
        """The reward of each rollout, or an error."""

    async def reference_logprobs(self, rollouts: Sequence[Rollout]) -> list[np.ndarray | None]:
        """float32 for each sampled token of each rollout; None without a reference."""

    async def teacher_logprobs(self, rollouts: Sequence[Rollout]) -> list[np.ndarray | None]:
        """The same from the teacher."""


class RolloutStream:
    """Generates and scores groups of rollouts, as far ahead of training as admission allows."""

    def __init__(
        self,
        config: PpoConfig,
        workers: RolloutWorkers,
        prompts: PromptSource,
        admission: Admission,
        logger: RunLogger,
        stop: StopRequest,
    ) -> None:
        self.config, self.workers, self.prompts, self.logger, self.stop = config, workers, prompts, logger, stop
        self.buffer = ExperienceBuffer(admission, config.samples_per_prompt, self.has_signal)

    @property
    def next_group(self) -> int:
        """Index of the first group that was not admitted yet."""
        return self.buffer.admission.next_group

    @property
    def unfinished(self) -> tuple[int, ...]:
        """Indices of the groups that were admitted, and neither trained nor dropped."""
        return self.buffer.unfinished

    async def run(self) -> None:
        """Admit, generate and score groups until cancelled."""
        async with asyncio.TaskGroup() as running:
            while True:
                requests: list[RolloutRequest] = []
                for index in await self.buffer.admit():
                    group = self.prompts.group(index)
                    self.buffer.expect(group[0].prompt.id, index)
                    requests += group
                running.create_task(self.produce(requests))

    async def produce(self, requests: Sequence[RolloutRequest]) -> None:
        """Generate rollouts, and score those that are finished as soon as they fill a scoring batch."""
        environment = self.config.environment
        batcher = TokenBatcher(
            self.config.reward.batch_tokens, self.config.samples_per_prompt if self.config.reward.needs_groups else 1
        )
        async with asyncio.TaskGroup() as scoring:
            with self.logger.timer("rollout"):
                async with aclosing(self.workers.generate(requests)) as rollouts:
                    async for rollout in rollouts:
                        if isinstance(rollout, EnvironmentFailed):
                            await self.drop(rollout.prompt_id, rollout, environment.on_error if environment else "fail")
                        elif batch := batcher.add(rollout):
                            scoring.create_task(self.score(batch))
            if rest := batcher.take():
                scoring.create_task(self.score(rest))

    async def score(self, rollouts: Sequence[Rollout]) -> None:
        """Ask reward, reference and teacher workers at the same time, and put the experiences into the buffer."""
        with self.logger.timer("scoring"):
            answers = await asyncio.gather(
                self.workers.score(rollouts),
                self.workers.reference_logprobs(rollouts),
                self.workers.teacher_logprobs(rollouts),
            )
        for rollout, score, reference, teacher in zip(rollouts, *answers, strict=True):
            if isinstance(score, RewardError):
                await self.drop(rollout.prompt.id, score, self.config.reward.on_error)
            elif not await self.buffer.put(Experience(rollout, score, reference, teacher)):
                self.logger.group_replaced(rollout.prompt.id)

    def has_signal(self, group: Sequence[Experience]) -> bool:
        """Whether the scores of a group differ. If they are equal, every advantage is zero."""
        scores = shaped_scores(group, self.config.algorithm, self.config.longest_response)
        return bool((scores != scores[0]).any())

    async def drop(
        self, prompt_id: str, error: RewardError | EnvironmentFailed, on_error: Literal["fail", "drop"]
    ) -> None:
        """Drop the prompt's whole group, or raise the error, as the config says. A failed reward never becomes 0."""
        if on_error == "fail":
            raise error
        if await self.buffer.drop(prompt_id):
            self.logger.group_dropped(prompt_id, str(error))

    async def take(self) -> list[Experience]:
        """Wait for the next batch: whole groups, in the order of their admission.

        Raises:
            RunStopped: the run is to stop. On resume the batch is generated again, with the same seeds.
        """
        return await self.stop.or_result(self.buffer.take(self.config.batch_size // self.config.samples_per_prompt))

    async def advance_version(self, version: int) -> None:
        """The rollout workers have a new policy, so that more groups may be admitted."""
        await self.buffer.advance_version(version)
