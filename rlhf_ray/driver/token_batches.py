"""Rollouts that finished, in batches by tokens. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rlhf_ray.types import Rollout


class TokenBatcher:
    """Collects rollouts until they hold `budget` tokens."""

    def __init__(self, budget: int, group: int = 1) -> None:
        """`group`: rollouts of one prompt that must be in the same batch; they count when they are all there."""
        self.budget, self.group = budget, group
        self._tokens = 0
        self._waiting: list[Rollout] = []
        self._incomplete: dict[str, list[Rollout]] = {}

    def add(self, rollout: Rollout) -> list[Rollout]:
        """A full batch, if this rollout filled one; else nothing."""
        members = self._incomplete.setdefault(rollout.prompt.id, [])
        members.append(rollout)
        if len(members) < self.group:
            return []
        self._waiting += self._incomplete.pop(rollout.prompt.id)
        self._tokens += sum(map(tokens_of, members))
        return self._full() if self._tokens >= self.budget else []

    def take(self) -> list[Rollout]:
        """What is waiting, at the end: also what is left of groups that lost members."""
        self._waiting += [rollout for members in self._incomplete.values() for rollout in members]
        self._incomplete.clear()
        return self._full()

    def _full(self) -> list[Rollout]:
        batch, self._waiting, self._tokens = self._waiting, [], 0
        return batch


def spread(rollouts: Sequence[Rollout], budget: int, workers: int) -> list[list[Rollout]]:
    """Rollouts that are there at once, in their order, in batches of about `budget` tokens, or of a worker's equal share."""
    tokens = sum(map(tokens_of, rollouts))
    collector = TokenBatcher(min(budget, math.ceil(tokens / workers)))
    batches = [collector.add(rollout) for rollout in rollouts] + [collector.take()]
    return [batch for batch in batches if batch]


def tokens_of(rollout: Rollout) -> int:
    """Of prompt and response."""
    return len(rollout.prompt.token_ids) + len(rollout)
