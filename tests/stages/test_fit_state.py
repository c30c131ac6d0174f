"""When a supervised stage stops, and which model it keeps."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.config.supervised import EarlyStoppingConfig
from rlhf_ray.stages.supervised_job import FitState


def after(losses, stopping=None):
    state = FitState()
    for number, loss in enumerate(losses):
        state = state.after(10 * number).measured(loss, stopping)
        if state.stopped:
            break
    return state


def test_the_best_is_the_lowest_and_the_first_of_equals():
    state = after([3.0, 1.0, 2.0, 1.0])
    assert (state.best_step, state.best_loss, state.step, state.stopped) == (10, 1.0, 30, False)


def test_patience_counts_measurements_in_a_row():
    stopping = EarlyStoppingConfig(patience=2)
    assert not after([3.0, 4.0, 2.0, 4.0, 1.0, 4.0], stopping).stopped
    state = after([3.0, 2.0, 2.5, 2.4, 1.0], stopping)
    assert state.stopped and (state.step, state.best_step) == (30, 10)


def test_small_gains_add_up_to_an_improvement():
    """Each gain is below the minimum, and two of them together are above it."""
    losses = [3.0, 2.94, 2.88, 2.82, 2.76]
    assert not after(losses, EarlyStoppingConfig(patience=2, min_improvement=0.1)).stopped
    state = after(losses, EarlyStoppingConfig(patience=1, min_improvement=0.1))
    assert state.stopped and (state.best_step, state.best_loss) == (10, 2.94)


@given(st.lists(st.floats(0, 9), min_size=1, max_size=12), st.integers(1, 4), st.floats(0, 1))
def test_the_kept_model_is_the_best_measured_one(losses, patience, gain):
    stopping = EarlyStoppingConfig(patience=patience, min_improvement=gain)
    state = after(losses, stopping)
    seen = losses[: state.step // 10 + 1]
    assert state.best_loss == min(seen) and state.best_step == 10 * seen.index(min(seen))
    assert state.stopped == (state.without_improvement >= patience)
