"""Who may be given requests: the life of a rollout worker as a pure state machine.

Invariant: a worker that is STALE (in an update, or disagreeing with the learner, or silent) becomes READY only by a
complete publication with a passing probe; DEAD is final.
"""

from __future__ import annotations

from enum import Enum


class State(Enum):
    """What a worker is good for."""

    STARTING = "starting"
    READY = "ready"
    """Holds a known policy whole: it may generate."""
    STALE = "stale"
    """Its weights are unknown, torn or unconfirmed: it may only be published to."""
    DEAD = "dead"


class Happening(Enum):
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
    (State.STARTING, Happening.STARTED): State.READY,
    (State.READY, Happening.UPDATE_BEGUN): State.STALE,
    (State.STALE, Happening.UPDATE_BEGUN): State.STALE,
    (State.STALE, Happening.CONFIRMED): State.READY,
    (State.STALE, Happening.REJECTED): State.STALE,
    (State.STARTING, Happening.DIED): State.DEAD,
    (State.READY, Happening.DIED): State.DEAD,
    (State.STALE, Happening.DIED): State.DEAD,
    (State.DEAD, Happening.DIED): State.DEAD,
}


def transition(state: State, happening: Happening) -> State:
    """The state after something happened.

    Raises:
        ValueError: it cannot happen in this state.
    """
    try:
        return _TRANSITIONS[state, happening]
    except KeyError:
        possible = ", ".join(h.value for s, h in _TRANSITIONS if s is state)
        raise ValueError(f"{happening.value} cannot happen to a {state.value} worker; possible: {possible}") from None
