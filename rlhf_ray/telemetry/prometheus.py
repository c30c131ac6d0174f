"""Exports metrics, events and alerts to Prometheus through the Ray agent of this node, and lists what is exported.

Invariant: nothing happens if Ray is not running in this process; nothing here starts or joins a cluster.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_ray.telemetry.names import describe, gauge_name

if TYPE_CHECKING:
    from ray.util.metrics import Counter, Gauge

EVENTS = "rlhf_events"
"""Name of the counter of events in Ray; Prometheus adds `_total`."""
ALERT = "rlhf_alert"
"""Name of the gauge of alerts in Ray."""


class StepGauges:
    """Exports the latest finite metrics of a stage, with one gauge for each."""

    def __init__(self, run: str, stage: str) -> None:
        self._tags = {"run": run, "stage": stage}
        self._gauges: dict[str, Gauge] = {}

    def set(self, metrics: Mapping[str, float | int | None]) -> None:
        """Export the metrics of a step; None leaves a gauge unchanged."""
        if not _ray_is_running():
            return
        for name, value in metrics.items():
            if value is not None:
                if name not in self._gauges:
                    self._gauges[name] = _gauge(gauge_name(name), describe(name).description, tuple(self._tags))
                self._gauges[name].set(value, self._tags)


class AlertGauge:
    """Exports which alerts of a run are active: 1 if active, otherwise 0."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauge: Gauge | None = None

    def set(self, active: Mapping[str, bool]) -> None:
        """Export the state of each alert, by name."""
        if not _ray_is_running():
            return
        if self._gauge is None:
            self._gauge = _gauge(ALERT, "1 while the alert is active", ("run", "alert"))
        for name, is_active in active.items():
            self._gauge.set(float(is_active), {"run": self._run, "alert": name})


class EventCounter:
    """Counts the events of a run by kind."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._counter: Counter | None = None

    def count(self, kind: str) -> None:
        """Count one event."""
        if not _ray_is_running():
            return
        if self._counter is None:
            from ray.util.metrics import Counter

            self._counter = Counter(EVENTS, "events of a run by kind", ("run", "kind"))
        self._counter.inc(1, {"run": self._run, "kind": kind})


def _ray_is_running() -> bool:
    """A process that has not imported Ray is not part of a cluster, and does not need to wait for the import."""
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def _gauge(name: str, description: str, tags: tuple[str, ...]) -> Gauge:
    from ray.util.metrics import Gauge

    # Ray's exporter accepts only ASCII.
    text = description.replace("Δ", "difference of").encode("ascii", "ignore").decode()
    return Gauge(name, text, tag_keys=tags)


@dataclass(frozen=True)
class ExportedMetric:
    """A Prometheus metric that is not in the catalogue of step metrics."""

    name: str
    unit: str
    labels: tuple[str, ...]
    """Labels that distinguish series; Ray adds those of node, process and session."""
    description: str
    histogram: bool = False
    """Exported as `_bucket`, `_sum` and `_count`."""

    @property
    def series(self) -> tuple[str, ...]:
        """The names that are exported."""
        return tuple(f"{self.name}_{part}" for part in ("bucket", "sum", "count")) if self.histogram else (self.name,)


RUN_METRICS = (
    ExportedMetric(
        "ray_rlhf_events_total", "events", ("run", "kind"), "events of a run: faults, drops, worker changes, …"
    ),
    ExportedMetric("ray_rlhf_alert", "", ("run", "alert"), "1 while the alert is active, 0 before and after"),
)
_REQUEST = ("application", "route", "method", "status_code")
_REPLICA = ("application", "deployment", "replica")
SERVING_METRICS = (
    ExportedMetric("ray_serve_num_http_requests_total", "requests", _REQUEST, "HTTP requests that were answered"),
    ExportedMetric(
        "ray_serve_num_http_error_requests_total", "requests", ("application", "route", "method", "error_code"),
        "those answered with a status of 400 or above",
    ),
    ExportedMetric(
        "ray_serve_http_request_latency_ms", "ms", _REQUEST, "time from a request to the end of its answer", True
    ),
    ExportedMetric(
        "ray_serve_deployment_request_counter_total", "requests", _REPLICA,
        "requests that a replica has finished; each version of a policy is an application of its own",
    ),
    ExportedMetric(
        "ray_serve_deployment_processing_latency_ms", "ms", _REPLICA,
        "time that a replica spent on a request", True,
    ),
    ExportedMetric(
        "ray_serve_replica_processing_queries", "requests", _REPLICA, "requests that a replica is working on"
    ),
    ExportedMetric(
        "ray_serve_deployment_queued_queries", "requests", ("application", "deployment"),
        "requests that wait for a replica",
    ),
    ExportedMetric(
        "ray_serve_deployment_replica_healthy", "", _REPLICA, "1 for a replica that passes its health check"
    ),
)  # fmt: skip
