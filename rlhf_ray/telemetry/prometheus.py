"""Figures, events and alerts for Prometheus, through Ray's agent on this node.

Invariant: nothing happens where Ray does not run in this process; nothing here starts or joins a cluster.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_ray.telemetry.names import describe, gauge_name

EVENTS = "rlhf_events"
"""Ray's name of the counter of events; Prometheus adds `_total`."""
ALERT = "rlhf_alert"
"""Ray's name of the gauge of alerts."""


@dataclass(frozen=True)
class Exported:
    """One metric of Prometheus."""

    name: str
    unit: str
    labels: tuple[str, ...]
    """Those that tell series apart; Ray adds the node, the process and the session."""
    description: str
    histogram: bool = False
    """It is exported as `_bucket`, `_sum` and `_count`."""

    @property
    def series(self) -> tuple[str, ...]:
        """The names that are exported."""
        return tuple(f"{self.name}_{part}" for part in ("bucket", "sum", "count")) if self.histogram else (self.name,)


OF_RUNS = (
    Exported("ray_rlhf_events_total", "events", ("run", "kind"), "what happened in a run: faults, drops, joins, …"),
    Exported("ray_rlhf_alert", "", ("run", "alert"), "1 while the alert lasts, 0 before and after"),
)
_REQUEST = ("application", "route", "method", "status_code")
_REPLICA = ("application", "deployment", "replica")
OF_SERVING = (
    Exported("ray_serve_num_http_requests_total", "requests", _REQUEST, "HTTP requests that were answered"),
    Exported(
        "ray_serve_num_http_error_requests_total", "requests", ("application", "route", "method", "error_code"),
        "of these with a status of 400 or above",
    ),
    Exported("ray_serve_http_request_latency_ms", "ms", _REQUEST, "from a request to the end of its answer", True),
    Exported(
        "ray_serve_deployment_request_counter_total", "requests", _REPLICA,
        "requests that a replica has done; a version of a policy is an application of its own",
    ),
    Exported(
        "ray_serve_deployment_processing_latency_ms", "ms", _REPLICA,
        "time in which a replica worked on a request", True,
    ),
    Exported("ray_serve_replica_processing_queries", "requests", _REPLICA, "requests that a replica works on now"),
    Exported(
        "ray_serve_deployment_queued_queries", "requests", ("application", "deployment"),
        "requests that wait for a replica",
    ),
    Exported("ray_serve_deployment_replica_healthy", "", _REPLICA, "1 for a replica that passes its health check"),
)  # fmt: skip


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
