"""A worker as the pool sees it, and what the pool tells of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ray.actor import ActorHandle

from rlhf_ray.rollout.membership import Happening, State, transition
from rlhf_ray.rollout.requests import WorkerInfo


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

    def happened(self, happening: Happening, cause: str = "") -> None:
        """Move to the next state."""
        self.state = transition(self.state, happening)
        self.cause = cause

    def __str__(self) -> str:
        return f"{self.name} is {self.state.value}" + (f" ({self.cause})" if self.cause else "")
