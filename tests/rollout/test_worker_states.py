"""The states of a worker: which transitions make it READY."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.rollout.workers import State, WorkerTransition, next_state


@given(st.lists(st.sampled_from(list(WorkerTransition)), max_size=12))
def test_a_ready_worker_has_started_or_was_confirmed_after_its_last_update(transitions: list[WorkerTransition]) -> None:
    state, seen = State.STARTING, []
    for transition in transitions:
        try:
            state = next_state(state, transition)
        except ValueError:
            continue
        seen.append(transition)
        if state is State.READY:
            assert seen[-1] in (WorkerTransition.STARTED, WorkerTransition.CONFIRMED)
            assert WorkerTransition.DIED not in seen


@given(st.sampled_from(list(WorkerTransition)))
def test_a_dead_worker_stays_dead(transition: WorkerTransition) -> None:
    if transition is WorkerTransition.DIED:
        assert next_state(State.DEAD, transition) is State.DEAD
    else:
        with pytest.raises(ValueError, match="dead worker"):
            next_state(State.DEAD, transition)


def test_a_rejected_worker_comes_back_only_by_a_confirmed_update() -> None:
    state = next_state(next_state(State.READY, WorkerTransition.UPDATE_BEGUN), WorkerTransition.REJECTED)
    assert state is State.STALE
    with pytest.raises(ValueError, match="is not possible for a stale worker; possible: .*confirmed"):
        next_state(state, WorkerTransition.STARTED)
    assert next_state(next_state(state, WorkerTransition.UPDATE_BEGUN), WorkerTransition.CONFIRMED) is State.READY
