"""How waiting requests are shared among workers: level loads, and none beyond what a worker can hold."""

from __future__ import annotations

from collections.abc import Sequence


def share(waiting: int, loads: Sequence[int], capacity: int) -> list[int]:
    """How many of `waiting` requests each worker gets, so that the highest load is as low as it can be.

    Args:
        waiting: requests without a worker.
        loads: unfinished requests of each worker.
        capacity: most unfinished requests of one worker.

    Returns:
        One number per worker; their sum is below `waiting` where the workers are full.
    """
    given = [0] * len(loads)
    order = sorted(range(len(loads)), key=lambda worker: loads[worker])
    remaining = min(waiting, sum(max(capacity - load, 0) for load in loads))
    # Fill the lowest up to the level of the next: the first k workers end level, the others get nothing.
    for k in range(len(order), 0, -1):
        lowest = order[:k]
        total = remaining + sum(loads[worker] for worker in lowest)
        level, extra = divmod(total, k)
        if loads[lowest[-1]] <= level:
            for position, worker in enumerate(lowest):
                given[worker] = level + (position < extra) - loads[worker]
            break
    return given
