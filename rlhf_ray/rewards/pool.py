"""Driver-side view of a frozen role: any number of equal workers, work to the one with the fewest tokens outstanding."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import ray
from ray.actor import ActorHandle

from rlhf_ray.types import Rollout

Answer = TypeVar("Answer")


class ScoringPool(Generic[Answer]):
    """Workers that answer one value per rollout."""

    def __init__(self, workers: Sequence[ActorHandle], method: str) -> None:
        self.workers = tuple(workers)
        self.method = method
        self.outstanding = [0] * len(self.workers)

    @classmethod
    async def start(
        cls, actor: type, method: str, count: int, options: Callable[[int], dict[str, Any]], *arguments: Any
    ) -> ScoringPool:
        """Start `count` actors and wait until they have loaded their models."""
        remote = ray.remote(actor)
        workers = [remote.options(**options(index)).remote(*arguments) for index in range(count)]
        await asyncio.gather(*(worker.__ray_ready__.remote() for worker in workers))
        return cls(workers, method)

    async def __call__(self, rollouts: Sequence[Rollout]) -> list[Answer]:
        """The answers, in order."""
        return await self.ask(self.method, rollouts)

    async def ask(self, method: str, rollouts: Sequence[Rollout]) -> list[Any]:
        """What a worker says of the rollouts by another of its methods, in order."""
        index = self.outstanding.index(min(self.outstanding))
        tokens = sum(len(r.prompt.token_ids) + len(r) for r in rollouts)
        self.outstanding[index] += tokens
        try:
            return await getattr(self.workers[index], method).remote(list(rollouts))
        finally:
            self.outstanding[index] -= tokens

    async def ask_all(self, method: str, *arguments: Any) -> list[Any]:
        """What every worker answers to the same call."""
        return await asyncio.gather(*(getattr(worker, method).remote(*arguments) for worker in self.workers))

    def close(self) -> None:
        for worker in self.workers:
            ray.kill(worker)
