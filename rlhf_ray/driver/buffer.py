"""Where rollouts wait to be trained on: between the coroutine that streams them and the one that trains.

Invariants: bounded by admission; a batch is handed over in the order of admission, not of arrival, so that a run does not
depend on timing; every group that was admitted is trained, given up, or among the `unfinished`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rlhf_ray.errors import InputError
from rlhf_ray.types import Experience


@dataclass
class Admission:
    """Counts of groups, in units of groups of one prompt."""

    groups_per_batch: int
    staleness: int = 0
    version: int = 0
    """Published policy version."""
    next_group: int = 0
    """Index of the next group to admit: the cursor into the prompt source."""
    accepted: int = 0
    """Groups complete so far, trained ones included."""
    running: int = 0
    """Groups being generated or scored."""
    dropped_since_batch: int = 0
    """Dropped groups since the last batch was taken."""
    attempts: int = 1
    """A batch may cost the generation of so many times its groups; 1: groups without signal are trained, too."""
    again: tuple[int, ...] = ()
    """Groups that an earlier attempt at the run had admitted and did not train: they come first."""
    first_of_batch: int = field(init=False)
    """Index of the first group that the present policy version began."""

    def __post_init__(self) -> None:
        self.first_of_batch = self.next_group

    def admit(self) -> list[int]:
        """Indices of the groups that may start now; they count as running."""
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
        """A running group is given up.

        Raises:
            TooManyDrops: more groups were dropped than a batch holds; training would wait for ever.
        """
        self.running -= 1
        self.dropped_since_batch += 1
        if self.dropped_since_batch > self.groups_per_batch:
            raise TooManyDrops(
                f"{self.dropped_since_batch} groups were dropped while collecting one batch of {self.groups_per_batch}; "
                "see the drop events for the reason"
            )

    def resample(self, index: int) -> bool:
        """Whether a running group, complete but without signal, makes room for another; if not, it must be accepted."""
        if self.attempts == 1 or index >= self.first_of_batch + (self.attempts - 1) * self.groups_per_batch:
            return False
        self.running -= 1
        return True

    def advance_version(self, version: int) -> None:
        """A new policy version is with the rollout workers."""
        self.version = version
        self.dropped_since_batch = 0
        self.first_of_batch = self.next_group


class TooManyDrops(InputError, RuntimeError):
    """Nearly everything that is generated is dropped."""


@dataclass
class GroupCollector:
    """Collects the samples of each prompt until a group is complete.

    Invariant: every group ends exactly once, as complete or as dropped; what arrives for a dropped group is ignored.
    """

    size: int
    _parts: dict[str, dict[int, object]] = field(default_factory=dict)
    _dropped: dict[str, int] = field(default_factory=dict)

    def add(self, prompt_id: str, sample_index: int, item: object) -> list[object] | None:
        """The whole group in sample order, if this was its last part."""
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
        """Give up a group because of one of its samples; whether it was still alive."""
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
        """`has_signal` says of a complete group whether there is anything to learn from it."""
        self.admission, self._has_signal = admission, has_signal
        self._assembler = GroupCollector(samples_per_prompt)
        self._ready: dict[int, list[Experience]] = {}
        self._index: dict[str, int] = {}
        self._changed = asyncio.Condition()

    @property
    def unfinished(self) -> tuple[int, ...]:
        """Indices of the groups that were admitted, and neither handed over nor given up."""
        return tuple(sorted({*self._index.values(), *self._ready}))

    async def admit(self) -> list[int]:
        """Wait until groups may start; their indices."""
        async with self._changed:
            while not (admitted := self.admission.admit()):
                await self._changed.wait()
            return admitted

    def expect(self, prompt_id: str, index: int) -> None:
        """The group of `prompt_id` is admitted as number `index`."""
        self._index[prompt_id] = index

    async def put(self, experience: Experience) -> bool:
        """Add one sample. False: it completed a group without signal, which is given up; room is made for another."""
        request = experience.rollout.request
        group = self._assembler.add(request.prompt.id, request.sample_index, experience)
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
        """Give up a group; whether it was still alive. Room is made for another."""
        alive = self._assembler.drop(prompt_id)
        if alive:
            async with self._changed:
                del self._index[prompt_id]
                self.admission.drop()
                self._changed.notify_all()
        return alive

    async def take(self, groups: int) -> list[Experience]:
        """Wait for that many groups; their experiences, oldest group first."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._ready) >= groups)
            chosen = sorted(self._ready)[:groups]
            return [experience for index in chosen for experience in self._ready.pop(index)]

    async def advance_version(self, version: int) -> None:
        """Tell admission that the workers have a new policy."""
        async with self._changed:
            self.admission.advance_version(version)
            self._changed.notify_all()
