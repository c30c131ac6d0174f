"""The roles of a run, started together and stopped together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rlhf_ray.config.reward import RewardConfig
from rlhf_ray.config.run import RunConfig
from rlhf_ray.driver.token_batches import spread
from rlhf_ray.environments.base import EnvironmentFailed
from rlhf_ray.environments.runner import EpisodeRunner
from rlhf_ray.learner.actor import LearnerSpec
from rlhf_ray.learner.group import LearnerGroup
from rlhf_ray.models.loading import check_same_tokenizer, load_tokenizer
from rlhf_ray.rewards.answers import RewardError
from rlhf_ray.rewards.http import Usage, read_keys
from rlhf_ray.rewards.workers import ReferenceWorker, RewardWorker, ScoringPool, TeacherWorker
from rlhf_ray.rollout.pool import RolloutPool, WorkerEvent
from rlhf_ray.runs.storage.location import portable
from rlhf_ray.runs.storage.session import run_folder
from rlhf_ray.runtime.placement import Placement
from rlhf_ray.types import Rollout, RolloutRequest, Score

LEARNERS: tuple[Literal["policy", "value", "discriminator"], ...] = ("policy", "value", "discriminator")
BATCHES_WAITING = 64
"""Scoring batches for which a reward worker waits for services at the same time."""


@dataclass(frozen=True)
class ModelPaths:
    """Hugging Face folders that the roles start from."""

    policy: str
    """Also the reference, and what rollout workers load before the first publication."""
    value: str
    reward: tuple[str, ...]
    """Members of an ensemble, or one; none where no reward model of ours rewards."""
    teacher: str | None = None
    """None where nobody teaches."""
    discriminator: str | None = None
    """None where no reward is learned from demonstrations."""

    def portable(self) -> ModelPaths:
        """References that every node understands (`storage.location`)."""
        teacher, discriminator = (path and portable(path) for path in (self.teacher, self.discriminator))
        reward = tuple(map(portable, self.reward))
        return ModelPaths(portable(self.policy), portable(self.value), reward, teacher, discriminator)


@dataclass(frozen=True)
class Roles:
    """Handles to everything that runs."""

    pool: RolloutPool
    reward: ScoringPool | None
    reference: ScoringPool | None
    policy: LearnerGroup | None
    value: LearnerGroup | None
    teacher: ScoringPool | None = None
    config: RewardConfig = RewardConfig()
    """Of the reward."""
    episodes: EpisodeRunner | None = None
    """Plays episodes of an environment on the pool; None without an environment."""
    discriminator: LearnerGroup | None = None

    @classmethod
    async def start(
        cls, config: RunConfig, paths: ModelPaths, placement: Placement, on_event: Callable[[WorkerEvent], None]
    ) -> Roles:
        """Start all roles at the same time; if one fails, stop the others and raise its error."""
        roles = placement.roles
        if paths.teacher is not None:
            check_same_tokenizer(paths.teacher, paths.policy, "ppo.teacher.model")
        if paths.discriminator is not None:
            check_same_tokenizer(paths.discriminator, paths.policy, "ppo.discriminator.model")
        tokenizer, paths = load_tokenizer(paths.policy), paths.portable()
        pool = RolloutPool(config.ppo.rollout, on_event, config.ppo.policy.lora)
        starting = {
            "rollout": pool.start(paths.policy, config.context_tokens, 0, _options(placement, "rollout")),
            "reward": _start_reward(config, paths, placement) if "reward" in roles else None,
            "reference": _start_reference(config, paths, placement) if "reference" in roles else None,
            "teacher": _start_teacher(config, paths, placement) if "teacher" in roles else None,
        }
        starting |= {role: _start_learner(config, role, paths, placement) for role in LEARNERS if role in roles}
        tasks = {role: asyncio.create_task(start) for role, start in starting.items() if start is not None}
        try:
            await asyncio.gather(*tasks.values())
        except BaseException:
            for task in tasks.values():
                task.cancel()
            raise
        started = {role: task.result() for role, task in tasks.items()}
        names = ("reward", "reference", "policy", "value", "teacher")
        environment = config.ppo.environment
        episodes = environment and EpisodeRunner(pool, tokenizer, environment, config.context_tokens)
        discriminator = started.get("discriminator")
        return cls(pool, *(started.get(name) for name in names), config.ppo.reward, episodes, discriminator)

    def generate(self, requests: Sequence[RolloutRequest]) -> AsyncGenerator[Rollout | EnvironmentFailed]:
        """A rollout for each request as they finish, straight from the pool or, with an environment, an episode each."""
        return self.pool.generate(requests) if self.episodes is None else self.episodes.run(requests)

    async def rollouts(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        """A rollout for each request, in their order.

        Raises:
            EnvironmentFailed: for the first that has none.
        """
        by_id: dict[str, Rollout] = {}
        async with aclosing(self.generate(requests)) as arriving:
            async for rollout in arriving:
                if isinstance(rollout, EnvironmentFailed):
                    raise rollout
                by_id[rollout.id] = rollout
        return [by_id[request.id] for request in requests]

    async def raw_rewards(self, rollouts: Sequence[Rollout]) -> np.ndarray:
        """float64 [K, n]: what each of the K reward models says of n rollouts that are there at once, not normalised."""
        batches = spread(rollouts, self.config.batch_tokens, len(self.reward.workers))
        said = await asyncio.gather(*(self.reward.ask("raw_rewards", batch) for batch in batches))
        return np.stack([rewards for part in said for rewards in part], axis=1)

    async def score(self, rollouts: Sequence[Rollout]) -> list[Score | RewardError]:
        """A score for each rollout, or why there is none; one without parts where nobody rewards."""
        scores = [Score(0.0, {})] * len(rollouts) if self.reward is None else await self.reward(rollouts)
        return [
            score if isinstance(score, RewardError) else score.with_turns(rollout)
            for rollout, score in zip(rollouts, scores, strict=True)
        ]

    async def reference_logprobs(self, rollouts: Sequence[Rollout]) -> list[np.ndarray | None]:
        """float32 for each rollout and each token that the policy chose, or None where no reference runs."""
        return [None] * len(rollouts) if self.reference is None else await self.reference(rollouts)

    async def score_all(self, rollouts: Sequence[Rollout]) -> tuple[list[Score | RewardError], list[np.ndarray | None]]:
        """Scores and reference log-probabilities of many rollouts that are there at once, by all workers."""

        async def by(role: ScoringPool | None, ask: Callable[[Sequence[Rollout]], Awaitable[list]]) -> list:
            batches = spread(rollouts, self.config.batch_tokens, len(role.workers) if role else 1)
            return [answer for part in await asyncio.gather(*map(ask, batches)) for answer in part]

        return await asyncio.gather(by(self.reward, self.score), by(self.reference, self.reference_logprobs))

    async def teacher_logprobs(self, rollouts: Sequence[Rollout]) -> list[np.ndarray | None]:
        """float32 for each rollout and each token that the policy chose, or None where no teacher runs by itself."""
        return [None] * len(rollouts) if self.teacher is None else await self.teacher(rollouts)

    async def service_metrics(self) -> dict[str, float]:
        """What judges and other services were asked for since the last call, over all reward workers."""
        if not self.config.services:
            return {}
        totals: dict[str, Usage] = {}
        for usages in await self.reward.ask_all("usage"):
            totals |= {name: totals.get(name, Usage()) + usage for name, usage in usages.items()}
        return {name: value for service, usage in totals.items() for name, value in usage.metrics(service).items()}

    async def close(self) -> None:
        """Stop every actor."""
        await self.pool.close()
        for role in (self.reward, self.reference, self.teacher, self.policy, self.value, self.discriminator):
            if role is not None:
                role.close()


def _options(placement: Placement, role: str) -> Callable[[int], dict]:
    return lambda index: placement.options(role, index)


async def _start_reward(config: RunConfig, paths: ModelPaths, placement: Placement) -> ScoringPool:
    reward, options = config.ppo.reward, _options(placement, "reward")
    # Batches that wait for services must not make others wait: they share the actor, each in a thread.
    threads = {"max_concurrency": BATCHES_WAITING} if reward.services else {}
    return await ScoringPool.start(
        RewardWorker, "score", reward.workers.count, lambda index: options(index) | threads,
        reward, paths.reward, paths.policy, read_keys(reward), portable(run_folder(config).path),
    )  # fmt: skip


async def _start_reference(config: RunConfig, paths: ModelPaths, placement: Placement) -> ScoringPool:
    reference, temperature = config.ppo.reference, config.ppo.rollout.sampling.temperature
    return await ScoringPool.start(
        ReferenceWorker, "logprobs", reference.workers.count, _options(placement, "reference"),
        reference, paths.policy, temperature,
    )  # fmt: skip


async def _start_teacher(config: RunConfig, paths: ModelPaths, placement: Placement) -> ScoringPool:
    teacher, temperature = config.ppo.teacher, config.ppo.rollout.sampling.temperature
    return await ScoringPool.start(
        TeacherWorker, "logprobs", teacher.workers.count, _options(placement, "teacher"),
        teacher, paths.teacher, temperature,
    )  # fmt: skip


async def _start_learner(
    config: RunConfig, role: Literal["policy", "value", "discriminator"], paths: ModelPaths, placement: Placement
) -> LearnerGroup:
    ppo, teacher = config.ppo, config.ppo.teacher
    beside = role == "policy" and teacher is not None and teacher.mode == "full_vocabulary"
    spec = LearnerSpec(
        role=role,
        model=getattr(paths, role),
        config=getattr(ppo, role),
        algorithm=ppo.algorithm,
        temperature=ppo.rollout.sampling.temperature,
        publish_dtype=ppo.rollout.dtype,
        seed=config.seed,
        publish_adapters=role == "policy" and ppo.rollout.weights.lora == "adapter",
        teacher=teacher.model_copy(update={"model": paths.teacher}) if beside else None,
        smoothing=ppo.discriminator.smoothing if role == "discriminator" else 0.0,
    )
    return await LearnerGroup.start(spec, _options(placement, role))
