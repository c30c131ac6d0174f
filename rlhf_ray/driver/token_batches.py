"""Batches of finished rollouts, by their number of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rlhf_ray.types import Rollout


class TokenBatcher:
    """Collects rollouts until they hold `budget` tokens."""

    def __init__(self, budget: int, group: int = 1) -> None:
        """`group`: number of rollouts of one prompt that must be in the same batch; they count when all have arrived."""
        self.budget, self.group = budget, group
        self._tokens = 0
        self._waiting: list[Rollout] = []
        self._incomplete: dict[str, list[Rollout]] = {}

    def add(self, rollout: Rollout) -> list[Rollout]:
        """Add a rollout; returns a batch if it is full now, otherwise an empty list."""
        members = self._incomplete.setdefault(rollout.prompt.id, [])
        members.append(rollout)
        if len(members) < self.group:
            return []
        self._waiting += self._incomplete.pop(rollout.prompt.id)
        self._tokens += sum(map(tokens_of, members))
        return self._full() if self._tokens >= self.budget else []

    def take(self) -> list[Rollout]:
        """Take the rest at the end, including incomplete groups, whose other members were lost."""
        self._waiting += [rollout for members in self._incomplete.values() for rollout in members]
        self._incomplete.clear()
        return self._full()

    def _full(self) -> list[Rollout]:
        batch, self._waiting, self._tokens = self._waiting, [], 0
        return batch


def spread(rollouts: Sequence[Rollout], budget: int, workers: int) -> list[list[Rollout]]:
    """Cut rollouts, in their order, into batches of about `budget` tokens or an equal share for each worker."""
    tokens = sum(map(tokens_of, rollouts))
    collector = TokenBatcher(min(budget, math.ceil(tokens / workers)))
    batches = [collector.add(rollout) for rollout in rollouts] + [collector.take()]
    return [batch for batch in batches if batch]


def tokens_of(rollout: Rollout) -> int:
    """Number of tokens of prompt and response together."""
    return len(rollout.prompt.token_ids) + len(rollout)
