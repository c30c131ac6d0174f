"""How much may be generated ahead, and which groups are complete. A pure state machine; rollouts themselves are elsewhere.

Invariants: trained + ready + running rollouts never exceed (staleness + version + 1)·batch (AReaL's admission rule, arXiv
2505.24298), so no token is older than `staleness` versions when it is trained; a group is handed on whole or dropped whole; a
dropped group makes room for another, so a batch is always full. Whether a group without signal makes room for another depends
on its index and not on when it was complete, so a synchronous run makes the same batches in every attempt.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rlhf_ray.errors import InputError


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

    def publish(self, version: int) -> None:
        """A new policy version is with the rollout workers."""
        self.version = version
        self.dropped_since_batch = 0
        self.first_of_batch = self.next_group


class TooManyDrops(InputError, RuntimeError):
    """Nearly everything that is generated is dropped."""


@dataclass
class GroupAssembler:
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
