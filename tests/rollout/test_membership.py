"""The life of a worker: which roads lead to being used."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.rollout.workers import Happening, State, transition


@given(st.lists(st.sampled_from(list(Happening)), max_size=12))
def test_whoever_is_used_started_or_was_confirmed_after_its_last_update(happenings: list[Happening]) -> None:
    state, seen = State.STARTING, []
    for happening in happenings:
        try:
            state = transition(state, happening)
        except ValueError:
            continue
        seen.append(happening)
        if state is State.READY:
            assert seen[-1] in (Happening.STARTED, Happening.CONFIRMED)
            assert Happening.DIED not in seen


@given(st.sampled_from(list(Happening)))
def test_the_dead_stay_dead(happening: Happening) -> None:
    if happening is Happening.DIED:
        assert transition(State.DEAD, happening) is State.DEAD
    else:
        with pytest.raises(ValueError, match="dead worker"):
            transition(State.DEAD, happening)


def test_a_rejected_worker_comes_back_only_by_a_confirmed_update() -> None:
    state = transition(transition(State.READY, Happening.UPDATE_BEGUN), Happening.REJECTED)
    assert state is State.STALE
    with pytest.raises(ValueError, match="cannot happen to a stale worker; possible: .*confirmed"):
        transition(state, Happening.STARTED)
    assert transition(transition(state, Happening.UPDATE_BEGUN), Happening.CONFIRMED) is State.READY
