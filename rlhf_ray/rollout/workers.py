"""A worker as the pool sees it, and what the pool tells of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

import ray
from ray.actor import ActorHandle

from rlhf_ray.rollout.requests import WorkerInfo
from rlhf_ray.runtime.actor_calls import describe


class State(Enum):
    """What a worker is good for."""

    STARTING = "starting"
    READY = "ready"
    """Holds a known policy whole: it may generate."""
    STALE = "stale"
    """Its weights are unknown, torn or unconfirmed: it may only be published to."""
    DEAD = "dead"


class WorkerTransition(Enum):
    """What can happen to a worker."""

    STARTED = "started"
    """Its engine has loaded the model it was started with."""
    UPDATE_BEGUN = "update_begun"
    CONFIRMED = "confirmed"
    """A complete update arrived and its probe passed."""
    REJECTED = "rejected"
    """An update failed or timed out, or the probe disagreed."""
    DIED = "died"


_TRANSITIONS = {
    (State.STARTING, WorkerTransition.STARTED): State.READY,
    (State.READY, WorkerTransition.UPDATE_BEGUN): State.STALE,
    (State.STALE, WorkerTransition.UPDATE_BEGUN): State.STALE,
    (State.STALE, WorkerTransition.CONFIRMED): State.READY,
    (State.STALE, WorkerTransition.REJECTED): State.STALE,
    (State.STARTING, WorkerTransition.DIED): State.DEAD,
    (State.READY, WorkerTransition.DIED): State.DEAD,
    (State.STALE, WorkerTransition.DIED): State.DEAD,
    (State.DEAD, WorkerTransition.DIED): State.DEAD,
}


def transition(state: State, happening: WorkerTransition) -> State:
    """The state after something happened.

    Raises:
        ValueError: it cannot happen in this state.
    """
    try:
        return _TRANSITIONS[state, happening]
    except KeyError:
        possible = ", ".join(h.value for s, h in _TRANSITIONS if s is state)
        raise ValueError(f"{happening.value} cannot happen to a {state.value} worker; possible: {possible}") from None


@dataclass(frozen=True)
class WorkerEvent:
    """Something that happened to a worker; for the run's event log."""

    kind: Literal["started", "confirmed", "stale", "died", "redispatched"]
    worker: str
    message: str
    requests: tuple[str, ...] = ()
    """Ids of the requests that were taken from it (`redispatched`)."""


@dataclass
class Member:
    """One worker of a pool."""

    name: str
    actor: ActorHandle
    state: State = State.STARTING
    info: WorkerInfo | None = None
    """Known once it has started."""
    load: int = 0
    """Requests that were sent to it and not answered."""
    cause: str = ""
    """Why it is STALE or DEAD."""

    def happened(self, happening: WorkerTransition, cause: str = "") -> None:
        """Move to the next state."""
        self.state = transition(self.state, happening)
        self.cause = cause

    def __str__(self) -> str:
        return f"{self.name} is {self.state.value}" + (f" ({self.cause})" if self.cause else "")


class WorkerSet:
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
        member.happened(WorkerTransition.STARTED)
        self._tell("started", member, message)

    def update_begun(self, member: Member) -> None:
        """From here on it is unused until confirmed; nothing to tell."""
        member.happened(WorkerTransition.UPDATE_BEGUN, "a weight update began and did not end")

    def confirmed(self, member: Member, message: str) -> None:
        """It holds a known policy whole."""
        member.happened(WorkerTransition.CONFIRMED)
        self._tell("confirmed", member, message)

    def rejected(self, member: Member, cause: str) -> None:
        """It is alive, and must not be used."""
        member.happened(WorkerTransition.REJECTED, cause)
        self._tell("stale", member, f"{member.name} is not used: {cause}")

    def lost(self, member: Member, error: Exception, requests: tuple[str, ...] = ()) -> None:
        """It failed for good; `requests` go to others."""
        if member.state is not State.DEAD:
            cause = describe(error)
            member.happened(WorkerTransition.DIED, cause)
            self._tell("died", member, f"{member.name} is lost: {cause}")
            # "Unavailable" may mean "alive and unreachable": make sure that it cannot come back unnoticed.
            ray.kill(member.actor)
        if requests:
            self._tell("redispatched", member, f"{len(requests)} requests of {member.name} go to others", requests)

    def _tell(self, kind: Any, member: Member, message: str, requests: tuple[str, ...] = ()) -> None:
        self._on_event(WorkerEvent(kind, member.name, message, requests))
