"""The five roles of a run, started together and stopped together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_ray.config.run import RunConfig
from rlhf_ray.learner.actor import LearnerSpec
from rlhf_ray.learner.group import LearnerGroup
from rlhf_ray.placement import Placement
from rlhf_ray.rollout.pool import RolloutPool, WorkerEvent
from rlhf_ray.scoring.pool import ScoringPool
from rlhf_ray.scoring.sources import RewardError
from rlhf_ray.scoring.workers import ReferenceWorker, RewardWorker
from rlhf_ray.types import Rollout, Score


@dataclass(frozen=True)
class ModelPaths:
    """Hugging Face folders that the roles start from."""

    policy: str
    """Also the reference, and what rollout workers load before the first publication."""
    value: str
    reward: str | None
    """None where only functions reward."""


@dataclass(frozen=True)
class Roles:
    """Handles to everything that runs."""

    pool: RolloutPool
    reward: ScoringPool
    reference: ScoringPool | None
    policy: LearnerGroup | None
    value: LearnerGroup | None

    @classmethod
    async def start(
        cls, config: RunConfig, paths: ModelPaths, placement: Placement, on_event: Callable[[WorkerEvent], None]
    ) -> Roles:
        """Start all roles at the same time; if one fails, stop the others and raise its error."""
        roles = placement.roles
        pool = RolloutPool(config.ppo.rollout, on_event)
        starting = {
            "rollout": pool.start(paths.policy, context_length(config), 0, _options(placement, "rollout")),
            "reward": _start_reward(config, paths, placement),
            "reference": _start_reference(config, paths, placement) if "reference" in roles else None,
            "policy": _start_learner(config, "policy", paths.policy, placement) if "policy" in roles else None,
            "value": _start_learner(config, "value", paths.value, placement) if "value" in roles else None,
        }
        tasks = {role: asyncio.create_task(start) for role, start in starting.items() if start is not None}
        try:
            await asyncio.gather(*tasks.values())
        except BaseException:
            for task in tasks.values():
                task.cancel()
            raise
        started = {role: task.result() for role, task in tasks.items()}
        return cls(pool, started["reward"], started.get("reference"), started.get("policy"), started.get("value"))

    async def score(self, rollouts: Sequence[Rollout]) -> list[Score | RewardError]:
        """A score for each rollout, or why there is none."""
        return await self.reward(rollouts)

    async def reference_logprobs(self, rollouts: Sequence[Rollout]) -> list[np.ndarray | None]:
        """float32 [T] for each rollout, or None where no reference runs."""
        return [None] * len(rollouts) if self.reference is None else await self.reference(rollouts)

    async def close(self) -> None:
        """Stop every actor."""
        await self.pool.close()
        for role in (self.reward, self.reference, self.policy, self.value):
            if role is not None:
                role.close()


def context_length(config: RunConfig) -> int:
    """Most tokens of a prompt and its response."""
    rollout = config.ppo.rollout
    return rollout.max_sequence_tokens or config.data.max_prompt_tokens + rollout.sampling.max_new_tokens


def _options(placement: Placement, role: str) -> Callable[[int], dict]:
    return lambda index: placement.options(role, index)


async def _start_reward(config: RunConfig, paths: ModelPaths, placement: Placement) -> ScoringPool:
    reward = config.ppo.reward
    return await ScoringPool.start(
        RewardWorker, "score", reward.workers.count, _options(placement, "reward"), reward, paths.reward, paths.policy
    )


async def _start_reference(config: RunConfig, paths: ModelPaths, placement: Placement) -> ScoringPool:
    reference, temperature = config.ppo.reference, config.ppo.rollout.sampling.temperature
    return await ScoringPool.start(
        ReferenceWorker, "logprobs", reference.workers.count, _options(placement, "reference"),
        reference, paths.policy, temperature,
    )  # fmt: skip


async def _start_learner(config: RunConfig, role: str, model: str, placement: Placement) -> LearnerGroup:
    ppo = config.ppo
    spec = LearnerSpec(
        role=role,
        model=model,
        config=ppo.policy if role == "policy" else ppo.value,
        algorithm=ppo.algorithm,
        temperature=ppo.rollout.sampling.temperature,
        publish_dtype=ppo.rollout.dtype,
        seed=config.seed,
    )
    return await LearnerGroup.start(spec, _options(placement, role))
