"""The buffer between the coroutine that generates rollouts and the one that trains on them, the admission of new groups, and the
batches in which finished rollouts are scored.

Invariants: admission bounds the buffer; a batch is taken in the order of admission, not of arrival, so a run does not depend on
timing; every admitted group is trained, dropped, or among the `unfinished`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from rlhf_ray.errors import InputError
from rlhf_ray.types import Experience, Rollout

Item = TypeVar("Item")


@dataclass
class Admission:
    """Decides how many groups (all samples of one prompt) may be generated ahead of training."""

    groups_per_batch: int
    staleness: int = 0
    version: int = 0
    """The policy version of the rollout workers."""
    next_group: int = 0
    """Index of the next group to admit; the cursor into the prompt source."""
    accepted: int = 0
    """Groups completed so far, including trained ones."""
    running: int = 0
    """Groups being generated or scored."""
    dropped_since_batch: int = 0
    """Groups dropped since the policy version last changed."""
    attempts: int = 1
    """Groups that may be generated for one group of a batch; 1: groups without signal are trained on, too."""
    again: tuple[int, ...] = ()
    """Groups that an interrupted attempt at the run admitted and did not train; they come first."""
    first_of_batch: int = field(init=False)
    """Index of the first group admitted since the policy version last changed."""

    def __post_init__(self) -> None:
        self.first_of_batch = self.next_group

    def admit(self) -> list[int]:
        """Indices of the groups that may start now; they count as running from then on."""
        limit = (self.staleness + self.version + 1) * self.groups_per_batch
        count = max(0, limit - self.accepted - self.running)
        again, self.again = self.again[:count], self.again[count:]
        fresh = range(self.next_group, self.next_group + count - len(again))
        self.next_group += len(fresh)
        self.running += count
        return [*again, *fresh]

    def accept(self) -> None:
        """A running group is complete."""
        self.running -= 1
        self.accepted += 1

    def drop(self) -> None:
        """A running group is dropped.

        Raises:
            TooManyDrops: more groups were dropped than a batch holds; training might wait forever.
        """
        self.running -= 1
        self.dropped_since_batch += 1
        if self.dropped_since_batch > self.groups_per_batch:
            raise TooManyDrops(
                f"{self.dropped_since_batch} groups were dropped while collecting one batch of {self.groups_per_batch}; "
                "see the drop events for the reason"
            )

    def resample(self, index: int) -> bool:
        """Whether a complete group without signal is replaced by another; if not, it must be accepted."""
        if self.attempts == 1 or index >= self.first_of_batch + (self.attempts - 1) * self.groups_per_batch:
            return False
        self.running -= 1
        return True

    def advance_version(self, version: int) -> None:
        """The rollout workers have a new policy version."""
        self.version = version
        self.dropped_since_batch = 0
        self.first_of_batch = self.next_group


class TooManyDrops(InputError, RuntimeError):
    """More groups were dropped than a batch holds."""


@dataclass
class GroupCollector(Generic[Item]):
    """Collects the samples of each prompt until a group is complete.

    Invariant: every group ends exactly once, complete or dropped; samples that arrive for a dropped group are ignored.
    """

    size: int
    _parts: dict[str, dict[int, Item]] = field(default_factory=dict)
    _dropped: dict[str, int] = field(default_factory=dict)

    def add(self, prompt_id: str, sample_index: int, item: Item) -> list[Item] | None:
        """Add a sample; returns the whole group in sample order if it is complete now."""
        if prompt_id in self._dropped:
            self._count_down(prompt_id)
            return None
        parts = self._parts.setdefault(prompt_id, {})
        parts[sample_index] = item
        if len(parts) < self.size:
            return None
        del self._parts[prompt_id]
        return [parts[index] for index in sorted(parts)]

    def drop(self, prompt_id: str) -> bool:
        """Drop a group because of one of its samples; returns whether it was alive."""
        if prompt_id in self._dropped:
            self._count_down(prompt_id)
            return False
        remaining = self.size - len(self._parts.pop(prompt_id, {})) - 1
        if remaining:
            self._dropped[prompt_id] = remaining
        return True

    def _count_down(self, prompt_id: str) -> None:
        self._dropped[prompt_id] -= 1
        if self._dropped[prompt_id] == 0:
            del self._dropped[prompt_id]


class ExperienceBuffer:
    """Complete groups, by their index in the prompt source."""

    def __init__(
        self,
        admission: Admission,
        samples_per_prompt: int,
        has_signal: Callable[[Sequence[Experience]], bool] = lambda group: True,
    ) -> None:
        """`has_signal`: whether there is anything to learn from a complete group."""
        self.admission, self._has_signal = admission, has_signal
        self._collector: GroupCollector[Experience] = GroupCollector(samples_per_prompt)
        self._ready: dict[int, list[Experience]] = {}
        self._index: dict[str, int] = {}
        self._changed = asyncio.Condition()

    @property
    def unfinished(self) -> tuple[int, ...]:
        """Indices of the groups that were admitted, and neither taken nor dropped."""
        return tuple(sorted({*self._index.values(), *self._ready}))

    async def admit(self) -> list[int]:
        """Wait until groups may start; returns their indices."""
        async with self._changed:
            while not (admitted := self.admission.admit()):
                await self._changed.wait()
            return admitted

    def expect(self, prompt_id: str, index: int) -> None:
        """Say that the group of `prompt_id` was admitted as number `index`."""
        self._index[prompt_id] = index

    async def put(self, experience: Experience) -> bool:
        """Add one sample. Returns False if it completed a group without signal, which another group will replace."""
        request = experience.rollout.request
        group = self._collector.add(request.prompt.id, request.sample_index, experience)
        if group is None:
            return True
        async with self._changed:
            index = self._index.pop(request.prompt.id)
            kept = self._has_signal(group) or not self.admission.resample(index)
            if kept:
                self._ready[index] = group
                self.admission.accept()
            self._changed.notify_all()
        return kept

    async def drop(self, prompt_id: str) -> bool:
        """Drop a group, which another will replace; returns whether it was alive."""
        alive = self._collector.drop(prompt_id)
        if alive:
            async with self._changed:
                del self._index[prompt_id]
                self.admission.drop()
                self._changed.notify_all()
        return alive

    async def take(self, groups: int) -> list[Experience]:
        """Wait for that many groups; returns their experiences, oldest group first."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._ready) >= groups)
            chosen = sorted(self._ready)[:groups]
            return [experience for index in chosen for experience in self._ready.pop(index)]

    async def advance_version(self, version: int) -> None:
        """The rollout workers have a new policy version, so more groups may start."""
        async with self._changed:
            self.admission.advance_version(version)
            self._changed.notify_all()


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
