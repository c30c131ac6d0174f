"""The rollout workers of a pool, as the driver sees them: the states of a worker, and all workers together.

Invariants: only a READY worker generates. A worker is READY after it has loaded the model it was started with, or after a
complete weight update that its probe confirmed; from the start of an update until then it is STALE. A DEAD worker never comes
back. Only `WorkerSet` changes a state, and it reports each change once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

import ray
from ray.actor import ActorHandle

from rlhf_ray.rollout.requests import WorkerInfo


class State(Enum):
    """What a worker can be used for."""

    STARTING = "starting"
    READY = "ready"
    """It has the complete weights of a known policy and may generate."""
    STALE = "stale"
    """Its weights are unknown, incomplete or not confirmed: it may only receive weights."""
    DEAD = "dead"


class WorkerTransition(Enum):
    """What can happen to a worker."""

    STARTED = "started"
    """Its engine has loaded the model it was started with."""
    UPDATE_BEGUN = "update_begun"
    CONFIRMED = "confirmed"
    """A complete update arrived and the probe agreed."""
    REJECTED = "rejected"
    """An update failed or timed out, or the probe disagreed."""
    DIED = "died"


_NEXT_STATE = {
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


def next_state(state: State, transition: WorkerTransition) -> State:
    """The state after a transition.

    Raises:
        ValueError: the transition is not possible in this state.
    """
    try:
        return _NEXT_STATE[state, transition]
    except KeyError:
        possible = ", ".join(t.value for s, t in _NEXT_STATE if s is state)
        raise ValueError(
            f"{transition.value} is not possible for a {state.value} worker; possible: {possible}"
        ) from None


@dataclass
class WorkerHandle:
    """One worker of a pool."""

    name: str
    actor: ActorHandle
    state: State = State.STARTING
    info: WorkerInfo | None = None
    """Known once the worker has started."""
    load: int = 0
    """Requests that were sent to it and are not answered yet."""
    cause: str = ""
    """Why it is STALE or DEAD."""

    def apply(self, transition: WorkerTransition, cause: str = "") -> None:
        """Move to the next state."""
        self.state = next_state(self.state, transition)
        self.cause = cause

    def __str__(self) -> str:
        return f"{self.name} is {self.state.value}" + (f" ({self.cause})" if self.cause else "")


EventKind = Literal["started", "confirmed", "stale", "died", "redispatched"]


@dataclass(frozen=True)
class WorkerEvent:
    """A change of a worker, for the run's event log."""

    kind: EventKind
    worker: str
    message: str
    requests: tuple[str, ...] = ()
    """Ids of the requests that were taken from it (`redispatched`)."""


class WorkerSet:
    """All workers of a pool; makes and reports every change of a worker's state."""

    def __init__(self, on_event: Callable[[WorkerEvent], None]) -> None:
        self.workers: list[WorkerHandle] = []
        self._on_event = on_event

    @property
    def alive(self) -> list[WorkerHandle]:
        """The workers that can receive weights."""
        return [worker for worker in self.workers if worker.state in (State.READY, State.STALE)]

    @property
    def vocabulary(self) -> int:
        """Number of token ids that the model knows; all workers have the same model.

        Raises:
            RuntimeError: the workers have not started.
        """
        if not self.workers or (info := self.workers[0].info) is None:
            raise RuntimeError("the rollout workers have not started; call RolloutPool.start first")
        return info.vocabulary

    def __str__(self) -> str:
        return "; ".join(str(worker) for worker in self.workers)

    def started(self, worker: WorkerHandle, info: WorkerInfo, message: str) -> None:
        """Its engine has loaded the model."""
        worker.info = info
        worker.apply(WorkerTransition.STARTED)
        self._report("started", worker, message)

    def update_begun(self, worker: WorkerHandle) -> None:
        """A weight update began: the worker is not used until it is confirmed. This is not reported."""
        worker.apply(WorkerTransition.UPDATE_BEGUN, "a weight update began and did not end")

    def confirmed(self, worker: WorkerHandle, message: str) -> None:
        """It has the complete weights of a known policy."""
        worker.apply(WorkerTransition.CONFIRMED)
        self._report("confirmed", worker, message)

    def rejected(self, worker: WorkerHandle, cause: str) -> None:
        """It is alive but must not be used."""
        worker.apply(WorkerTransition.REJECTED, cause)
        self._report("stale", worker, f"{worker.name} is not used: {cause}")

    def lost(self, worker: WorkerHandle, error: Exception, requests: tuple[str, ...] = ()) -> None:
        """It failed for good; `requests` are sent to other workers."""
        if worker.state is not State.DEAD:
            cause = describe(error)
            worker.apply(WorkerTransition.DIED, cause)
            self._report("died", worker, f"{worker.name} is lost: {cause}")
            # "Unavailable" may mean "alive but unreachable": make sure that it cannot come back unnoticed.
            ray.kill(worker.actor)
        if requests:
            message = f"{len(requests)} requests of {worker.name} go to other workers"
            self._report("redispatched", worker, message, requests)

    def _report(self, kind: EventKind, worker: WorkerHandle, message: str, requests: tuple[str, ...] = ()) -> None:
        self._on_event(WorkerEvent(kind, worker.name, message, requests))


def describe(error: BaseException) -> str:
    """One line: what went wrong in an actor, without Ray's trace."""
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {str(cause).strip().splitlines()[0] if str(cause).strip() else 'no message'}"


async def call_all(
    actors: Mapping[str, ActorHandle], method: Callable[[ActorHandle], Awaitable[Any]], timeout_s: float
) -> dict[str, Any]:
    """Call all actors at once; returns each one's answer or exception by name (`TimeoutError` after `timeout_s`)."""
    answers = await asyncio.gather(
        *(asyncio.wait_for(method(actor), timeout_s) for actor in actors.values()), return_exceptions=True
    )
    return dict(zip(actors, answers, strict=True))
