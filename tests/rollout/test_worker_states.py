"""The life of a worker: which roads lead to being used."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.rollout.workers import State, WorkerTransition, transition


@given(st.lists(st.sampled_from(list(WorkerTransition)), max_size=12))
def test_whoever_is_used_started_or_was_confirmed_after_its_last_update(happenings: list[WorkerTransition]) -> None:
    state, seen = State.STARTING, []
    for happening in happenings:
        try:
            state = transition(state, happening)
        except ValueError:
            continue
        seen.append(happening)
        if state is State.READY:
            assert seen[-1] in (WorkerTransition.STARTED, WorkerTransition.CONFIRMED)
            assert WorkerTransition.DIED not in seen


@given(st.sampled_from(list(WorkerTransition)))
def test_the_dead_stay_dead(happening: WorkerTransition) -> None:
    if happening is WorkerTransition.DIED:
        assert transition(State.DEAD, happening) is State.DEAD
    else:
        with pytest.raises(ValueError, match="dead worker"):
            transition(State.DEAD, happening)


def test_a_rejected_worker_comes_back_only_by_a_confirmed_update() -> None:
    state = transition(transition(State.READY, WorkerTransition.UPDATE_BEGUN), WorkerTransition.REJECTED)
    assert state is State.STALE
    with pytest.raises(ValueError, match="cannot happen to a stale worker; possible: .*confirmed"):
        transition(state, WorkerTransition.STARTED)
    assert transition(transition(state, WorkerTransition.UPDATE_BEGUN), WorkerTransition.CONFIRMED) is State.READY
