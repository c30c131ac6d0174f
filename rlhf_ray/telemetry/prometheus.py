"""Figures, events and alerts for Prometheus, through Ray's agent on this node.

Invariant: nothing happens where Ray does not run in this process; nothing here starts or joins a cluster.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rlhf_ray.telemetry.exported import ALERT, EVENTS
from rlhf_ray.telemetry.names import describe, gauge_name

if TYPE_CHECKING:
    from ray.util.metrics import Gauge


class StepGauges:
    """The latest finite figures of a stage, a gauge for each."""

    def __init__(self, run: str, stage: str) -> None:
        self._tags = {"run": run, "stage": stage}
        self._gauges: dict[str, Gauge] = {}

    def set(self, figures: Mapping[str, float | int | None]) -> None:
        """Those of a step; None leaves a gauge as it was."""
        if not _ray_runs():
            return
        for name, value in figures.items():
            if value is not None:
                if name not in self._gauges:
                    self._gauges[name] = _gauge(gauge_name(name), describe(name).description, tuple(self._tags))
                self._gauges[name].set(value, self._tags)


class AlertGauge:
    """1 for the alerts of a run that last, 0 for the others."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauge: Gauge | None = None

    def set(self, lasting: Mapping[str, bool]) -> None:
        """By their names."""
        if not _ray_runs():
            return
        if self._gauge is None:
            self._gauge = _gauge(ALERT, "1 while the alert lasts", ("run", "alert"))
        for name, lasts in lasting.items():
            self._gauge.set(float(lasts), {"run": self._run, "alert": name})


class EventCounter:
    """What happened in a run, by kind."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._counter = None

    def count(self, kind: str) -> None:
        """One more."""
        if not _ray_runs():
            return
        if self._counter is None:
            from ray.util.metrics import Counter

            self._counter = Counter(EVENTS, "what happened in a run, by kind", ("run", "kind"))
        self._counter.inc(1, {"run": self._run, "kind": kind})


def _ray_runs() -> bool:
    """A process that has not even imported Ray is no part of a cluster, and need not wait for the import."""
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def _gauge(name: str, description: str, tags: tuple[str, ...]) -> Gauge:
    from ray.util.metrics import Gauge

    # Ray's exporter takes ASCII only.
    text = description.replace("Δ", "difference of").encode("ascii", "ignore").decode()
    return Gauge(name, text, tag_keys=tags)
