"""Sharing requests among workers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.rollout.dispatch import share


@given(
    waiting=st.integers(0, 60),
    loads=st.lists(st.integers(0, 25), min_size=1, max_size=6),
    capacity=st.integers(1, 25),
)
def test_loads_end_level_and_no_worker_is_overfull(waiting: int, loads: list[int], capacity: int) -> None:
    given_out = share(waiting, loads, capacity)
    after = [load + more for load, more in zip(loads, given_out, strict=True)]
    free = sum(max(capacity - load, 0) for load in loads)
    assert sum(given_out) == min(waiting, free) and min(given_out) >= 0
    for more, total in zip(given_out, after, strict=True):
        if more:
            assert total <= capacity
            # A worker that got requests is at most one above the least loaded worker.
            assert total <= min(after) + 1


def test_idle_workers_get_equal_parts() -> None:
    assert share(64, [0, 0], 100) == [32, 32]
    assert share(3, [5, 0, 0], 100) == [0, 2, 1]
