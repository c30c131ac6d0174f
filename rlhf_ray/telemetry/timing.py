"""Measures the wall time of a step: the seconds in which each phase was active, and the share in which each role was idle.

Invariants: a phase that several coroutines are in at the same time is counted once, so no phase is longer than the step; a
phase that is active when a step ends is split between the two steps. Only one event loop uses a timer.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager


class _Activity:
    """Wall time during which at least one of several overlapping intervals was open."""

    def __init__(self) -> None:
        self._open = 0
        self._since = 0.0
        self._total = 0.0

    def enter(self, now: float) -> None:
        if self._open == 0:
            self._since = now
        self._open += 1

    def leave(self, now: float) -> None:
        self._open -= 1
        if self._open == 0:
            self._total += now - self._since

    def lap(self, now: float) -> float:
        """Seconds since the last lap; open intervals are split at `now`."""
        if self._open:
            self._total += now - self._since
            self._since = now
        total, self._total = self._total, 0.0
        return total


class PhaseTimer:
    """Times the named phases of a step with `with timer("rollout"): …`, also in many coroutines at the same time."""

    def __init__(
        self, roles: Mapping[str, Collection[str]] | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """Start the first step.

        Args:
            roles: phases in which a role is busy, such as `{"learner": ("old_logprobs", "update")}`; else it is idle.
            clock: returns seconds and never goes back.
        """
        self._clock = clock
        self._phases: dict[str, _Activity] = {}
        self._roles: dict[str, _Activity] = {}
        self._roles_of: dict[str, list[_Activity]] = defaultdict(list)
        for role, busy_phases in (roles or {}).items():
            self._roles[role] = _Activity()
            for phase in busy_phases:
                self._roles_of[phase].append(self._roles[role])
        self._step_began = clock()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the wall time of the block to `phase`."""
        activities = [self._phases.setdefault(phase, _Activity()), *self._roles_of.get(phase, ())]
        now = self._clock()
        for activity in activities:
            activity.enter(now)
        try:
            yield
        finally:
            now = self._clock()
            for activity in activities:
                activity.leave(now)

    def lap(self) -> dict[str, float]:
        """End the step; returns `time/step_s`, `time/<phase>_s` of every phase so far, and `idle/<role>` between 0 and 1."""
        now = self._clock()
        step_s, self._step_began = now - self._step_began, now
        metrics = {"time/step_s": step_s}
        metrics |= {f"time/{phase}_s": activity.lap(now) for phase, activity in self._phases.items()}
        for role, activity in self._roles.items():
            busy_s = activity.lap(now)
            metrics[f"idle/{role}"] = 1 - busy_s / step_s if step_s > 0 else 0.0
        return metrics
