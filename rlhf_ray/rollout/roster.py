"""The members of a pool, their states, and the telling of what changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray

from rlhf_ray.rollout.membership import Happening, State
from rlhf_ray.rollout.workers import Member, WorkerEvent
from rlhf_ray.runtime.actor_calls import describe


class Roster:
    """Owns every change of a member's state; each change is told once."""

    def __init__(self, on_event: Callable[[WorkerEvent], None]) -> None:
        self.members: list[Member] = []
        self._on_event = on_event

    @property
    def living(self) -> list[Member]:
        """Whoever may be published to."""
        return [member for member in self.members if member.state in (State.READY, State.STALE)]

    @property
    def vocabulary(self) -> int:
        """Number of token ids that the model knows; all members have the same model."""
        return self.members[0].info.vocabulary

    def __str__(self) -> str:
        return "; ".join(str(member) for member in self.members)

    def started(self, member: Member, message: str) -> None:
        """Its engine is up."""
        member.happened(Happening.STARTED)
        self._tell("started", member, message)

    def update_begun(self, member: Member) -> None:
        """From here on it is unused until confirmed; nothing to tell."""
        member.happened(Happening.UPDATE_BEGUN, "a weight update began and did not end")

    def confirmed(self, member: Member, message: str) -> None:
        """It holds a known policy whole."""
        member.happened(Happening.CONFIRMED)
        self._tell("confirmed", member, message)

    def rejected(self, member: Member, cause: str) -> None:
        """It is alive, and must not be used."""
        member.happened(Happening.REJECTED, cause)
        self._tell("stale", member, f"{member.name} is not used: {cause}")

    def lost(self, member: Member, error: Exception, requests: tuple[str, ...] = ()) -> None:
        """It failed for good; `requests` go to others."""
        if member.state is not State.DEAD:
            cause = describe(error)
            member.happened(Happening.DIED, cause)
            self._tell("died", member, f"{member.name} is lost: {cause}")
            # "Unavailable" may mean "alive and unreachable": make sure that it cannot come back unnoticed.
            ray.kill(member.actor)
        if requests:
            self._tell("redispatched", member, f"{len(requests)} requests of {member.name} go to others", requests)

    def _tell(self, kind: Any, member: Member, message: str, requests: tuple[str, ...] = ()) -> None:
        self._on_event(WorkerEvent(kind, member.name, message, requests))
