"""The workers of all roles: started together, used by the driver as one object, and stopped together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlhf_ray.config.reward import RewardConfig, ScorerConfig
from rlhf_ray.config.run import RunConfig
from rlhf_ray.driver.buffer import spread
from rlhf_ray.environments.base import EnvironmentFailed
from rlhf_ray.environments.runner import EpisodeRunner
from rlhf_ray.learner.actor import LearnerSpec
from rlhf_ray.learner.group import LearnerGroup
from rlhf_ray.models.loading import check_same_tokenizer, load_tokenizer
from rlhf_ray.rewards.answers import RewardError
from rlhf_ray.rewards.http import Usage, read_keys
from rlhf_ray.rewards.workers import ScoringPool
from rlhf_ray.roles import ROLES
from rlhf_ray.rollout.pool import RolloutPool
from rlhf_ray.rollout.workers import WorkerEvent
from rlhf_ray.runs.storage.location import portable
from rlhf_ray.runs.storage.session import run_folder
from rlhf_ray.runtime.placement import Placement
from rlhf_ray.types import Rollout, RolloutRequest, Score

BATCHES_WAITING = 64
"""Scoring batches for which one reward worker waits for services at the same time."""


@dataclass(frozen=True)
class Roles:
    """The running workers of every role."""

    pool: RolloutPool
    config: RewardConfig = RewardConfig()
    """The section `ppo.reward`."""
    scorers: Mapping[str, ScoringPool] = field(default_factory=dict)
    """Reward, reference and teacher workers, by the name of the role; only those that the run has."""
    learners: Mapping[str, LearnerGroup] = field(default_factory=dict)
    """Policy, value model and discriminator; none if nothing is trained."""
    episodes: EpisodeRunner | None = None
    """Plays episodes of an environment on the pool; None without an environment."""

    @property
    def policy(self) -> LearnerGroup:
        """The policy's learner, which every PPO stage has."""
        return self.learners["policy"]

    @property
    def value(self) -> LearnerGroup | None:
        """The value model's learner."""
        return self.learners.get("value")

    @property
    def reward(self) -> ScoringPool | None:
        """The reward workers."""
        return self.scorers.get("reward")

    @property
    def teacher(self) -> ScoringPool | None:
        """The teacher workers, whose log-probabilities give advantages."""
        return self.scorers.get("teacher")

    def generate(self, requests: Sequence[RolloutRequest]) -> AsyncGenerator[Rollout | EnvironmentFailed]:
        """A rollout for each request as they finish, straight from the pool or, with an environment, an episode each."""
        return self.pool.generate(requests) if self.episodes is None else self.episodes.run(requests)

    async def rollouts(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        """A rollout for each request, in the order of the requests.

        Raises:
            EnvironmentFailed: an episode failed.
        """
        by_id: dict[str, Rollout] = {}
        async with aclosing(self.generate(requests)) as arriving:
            async for rollout in arriving:
                if isinstance(rollout, EnvironmentFailed):
                    raise rollout
                by_id[rollout.id] = rollout
        return [by_id[request.id] for request in requests]

    async def score(self, rollouts: Sequence[Rollout]) -> list[Score | RewardError]:
        """A score for each rollout, or the error of the source that failed. Without reward workers a score has no parts."""
        scores = [Score(0.0, {})] * len(rollouts) if self.reward is None else await self.reward(rollouts)
        return [
            score if isinstance(score, RewardError) else score.with_turns(rollout)
            for rollout, score in zip(rollouts, scores, strict=True)
        ]

    async def reference_logprobs(self, rollouts: Sequence[Rollout]) -> list[np.ndarray | None]:
        """float32 for each rollout and each token that the policy sampled; None without reference workers."""
        return await self._logprobs("reference", rollouts)

    async def teacher_logprobs(self, rollouts: Sequence[Rollout]) -> list[np.ndarray | None]:
        """float32 for each rollout and each token that the policy sampled; None without teacher workers."""
        return await self._logprobs("teacher", rollouts)

    async def _logprobs(self, role: str, rollouts: Sequence[Rollout]) -> list[np.ndarray | None]:
        workers = self.scorers.get(role)
        return [None] * len(rollouts) if workers is None else await workers(rollouts)

    async def score_all(self, rollouts: Sequence[Rollout]) -> tuple[list[Score | RewardError], list[np.ndarray | None]]:
        """Scores and reference log-probabilities of many rollouts, shared among all workers."""

        async def by_all(role: str, ask: Callable[[Sequence[Rollout]], Awaitable[list]]) -> list:
            workers = self.scorers.get(role)
            batches = spread(rollouts, self.config.batch_tokens, len(workers.workers) if workers else 1)
            return [answer for part in await asyncio.gather(*map(ask, batches)) for answer in part]

        return await asyncio.gather(by_all("reward", self.score), by_all("reference", self.reference_logprobs))

    async def raw_rewards(self, rollouts: Sequence[Rollout]) -> np.ndarray:
        """float64 [K, n]: the rewards of n rollouts by each of the K reward models, before normalisation."""
        workers = self.scorers["reward"]
        batches = spread(rollouts, self.config.batch_tokens, len(workers.workers))
        answers = await asyncio.gather(*(workers.ask("raw_rewards", batch) for batch in batches))
        return np.stack([rewards for part in answers for rewards in part], axis=1)

    async def service_metrics(self) -> dict[str, float]:
        """The use of judges and other services since the last call, summed over all reward workers."""
        if not self.config.services:
            return {}
        totals: dict[str, Usage] = {}
        for usages in await self.scorers["reward"].ask_all("usage"):
            totals |= {name: totals.get(name, Usage()) + usage for name, usage in usages.items()}
        return {name: value for service, usage in totals.items() for name, value in usage.metrics(service).items()}

    async def close(self) -> None:
        """Stop every actor."""
        await self.pool.close()
        for scorer in self.scorers.values():
            scorer.close()
        for learner in self.learners.values():
            learner.close()


@dataclass(frozen=True)
class ModelPaths:
    """Hugging Face folders that the roles load."""

    policy: str
    """Also for the reference, and for rollout workers until the first weight sync."""
    value: str
    reward: tuple[str, ...]
    """One reward model or the members of an ensemble; empty if no reward model is used."""
    teacher: str | None = None
    discriminator: str | None = None

    def portable(self) -> ModelPaths:
        """References that every node understands (see `storage.location`)."""
        teacher, discriminator = (path and portable(path) for path in (self.teacher, self.discriminator))
        reward = tuple(map(portable, self.reward))
        return ModelPaths(portable(self.policy), portable(self.value), reward, teacher, discriminator)


@dataclass(frozen=True)
class Startup:
    """What roles are started with."""

    config: RunConfig
    models: ModelPaths
    placement: Placement
    on_event: Callable[[WorkerEvent], None]

    def options(self, role: str) -> Callable[[int], dict[str, Any]]:
        """Ray options of actor i of a role."""
        return lambda index: self.placement.options(role, index)


async def start_workers(
    config: RunConfig, models: ModelPaths, placement: Placement, on_event: Callable[[WorkerEvent], None]
) -> Roles:
    """Start all roles of the placement at the same time; if one fails, cancel the others and raise its error."""
    if models.teacher is not None:
        check_same_tokenizer(models.teacher, models.policy, "ppo.teacher.model")
    if models.discriminator is not None:
        check_same_tokenizer(models.discriminator, models.policy, "ppo.discriminator.model")
    tokenizer = load_tokenizer(models.policy)
    startup = Startup(config, models.portable(), placement, on_event)
    tasks = {role: asyncio.create_task(ROLES[role].load("start")(role, startup)) for role in placement.roles}
    try:
        await asyncio.gather(*tasks.values())
    except BaseException:
        for task in tasks.values():
            task.cancel()
        raise
    started: dict[str, dict[str, Any]] = {"rollout": {}, "scoring": {}, "learner": {}}
    for role, task in tasks.items():
        started[ROLES[role].kind][role] = task.result()
    pool, environment = started["rollout"]["rollout"], config.ppo.environment
    episodes = EpisodeRunner(pool, tokenizer, environment, config.context_tokens) if environment else None
    return Roles(pool, config.ppo.reward, started["scoring"], started["learner"], episodes)


async def start_rollout(role: str, startup: Startup) -> RolloutPool:
    """Start the rollout workers with the policy that training starts from."""
    ppo = startup.config.ppo
    pool = RolloutPool(ppo.rollout, startup.on_event, ppo.policy.lora)
    await pool.start(startup.models.policy, startup.config.context_tokens, 0, startup.options(role))
    return pool


async def start_reward(role: str, startup: Startup) -> ScoringPool:
    """Start the reward workers."""
    reward, options = startup.config.ppo.reward, startup.options(role)
    # Batches that wait for services must not delay others: they share the actor, each in a thread.
    threads = {"max_concurrency": BATCHES_WAITING} if reward.services else {}
    return await ScoringPool.start(
        ROLES[role].load("actor"), "score", reward.workers.count, lambda index: options(index) | threads,
        reward, startup.models.reward, startup.models.policy, read_keys(reward),
        portable(run_folder(startup.config).path),
    )  # fmt: skip


async def start_reference(role: str, startup: Startup) -> ScoringPool:
    """Start the reference workers, frozen copies of the policy that training starts from."""
    return await _start_logprob_workers(role, startup, startup.config.ppo.reference, startup.models.policy)


async def start_teacher(role: str, startup: Startup) -> ScoringPool:
    """Start the teacher workers."""
    return await _start_logprob_workers(role, startup, startup.config.ppo.teacher, startup.models.teacher)


async def _start_logprob_workers(
    role: str, startup: Startup, config: ScorerConfig | None, model: str | None
) -> ScoringPool:
    assert config is not None and model is not None
    return await ScoringPool.start(
        ROLES[role].load("actor"), "logprobs", config.workers.count, startup.options(role),
        config, model, startup.config.ppo.rollout.sampling.temperature,
    )  # fmt: skip


async def start_learner(role: str, startup: Startup) -> LearnerGroup:
    """Start the ranks of one learner."""
    ppo, models = startup.config.ppo, startup.models
    teacher = None
    if role == "policy" and ppo.teacher is not None and ppo.teacher.mode == "full_vocabulary":
        teacher = ppo.teacher.model_copy(update={"model": models.teacher})
    spec = LearnerSpec(
        role=role,
        model=getattr(models, role),
        config=getattr(ppo, role),
        algorithm=ppo.algorithm,
        temperature=ppo.rollout.sampling.temperature,
        sync_dtype=ppo.rollout.dtype,
        seed=startup.config.seed,
        sync_adapters=role == "policy" and ppo.rollout.weights.lora == "adapter",
        teacher=teacher,
        smoothing=ppo.discriminator.smoothing if role == "discriminator" and ppo.discriminator else 0.0,
    )
    return await LearnerGroup.start(spec, startup.options(role))
