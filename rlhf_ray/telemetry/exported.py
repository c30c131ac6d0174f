"""What Prometheus finds beside the figures of steps: what happened, alerts, and Ray Serve's own metrics of an endpoint.

Invariant: every name here was seen in a real exporter's output by `tests/telemetry/test_dashboard.py` or
`tests/serving/test_endpoint.py`, which also hold the dashboard against it.
"""

from __future__ import annotations

from dataclasses import dataclass

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
