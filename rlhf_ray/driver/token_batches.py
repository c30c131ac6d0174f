"""Rollouts that finished, in batches by tokens. Pure."""

from __future__ import annotations

from rlhf_ray.types import Rollout


class TokenBatches:
    """Collects rollouts until they hold `budget` tokens."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._tokens = 0
        self._waiting: list[Rollout] = []

    def add(self, rollout: Rollout) -> list[Rollout]:
        """A full batch, if this rollout filled one; else nothing."""
        self._waiting.append(rollout)
        self._tokens += len(rollout.prompt.token_ids) + len(rollout)
        return self.take() if self._tokens >= self.budget else []

    def take(self) -> list[Rollout]:
        """What is waiting."""
        batch, self._waiting, self._tokens = self._waiting, [], 0
        return batch
