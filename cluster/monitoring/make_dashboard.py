"""Prints the Grafana dashboard as JSON, generated from the charts of the report.

Run it from the root of the repository: `python -m cluster.monitoring.make_dashboard > cluster/monitoring/dashboard.json`.
The panels use the names of the metric catalogue, so a metric that is renamed there is renamed here too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_ray.report.charts import PPO, REWARD_MODEL, SFT, TIME, Chart, ChartGroup
from rlhf_ray.telemetry.names import FAULTS, describe, exported_name
from rlhf_ray.telemetry.prometheus import RUN_METRICS, SERVING_METRICS

_RUN = 'run=~"$run"'
_UNITS = {"": "short", "%": "percentunit", "s": "s", "ms": "ms", "1/s": "short"}
"""Grafana's names of units; other units are shown as a suffix."""
_WIDTH, _HEIGHT, _COLUMNS = 8, 7, 3
_ENDED = (
    "For runs that have ended, rlhf-ray report shows all recorded values; Prometheus has only those that it scraped."
)


@dataclass(frozen=True)
class Query:
    """One query of a panel."""

    expression: str
    """PromQL."""
    legend: str


@dataclass(frozen=True)
class Panel:
    """One panel with time series."""

    title: str
    unit: str
    queries: tuple[Query, ...]
    description: str = ""


def dashboard() -> dict[str, Any]:
    """Grafana's JSON model: a row for each chart group of the report, one for alerts and faults, and one for endpoints."""
    rows: list[tuple[str, Sequence[Panel]]] = [_row(group, "ppo") for group in (*PPO, TIME)]
    rows.insert(1, ("Alerts and faults", _event_panels()))
    rows += [_row(SFT, "sft"), _row(REWARD_MODEL, "reward_model.*"), ("Endpoints", _serving_panels())]
    return {
        "uid": "rlhf-ray",
        "title": "RLHF",
        "description": f"Runs and endpoints of rlhf_ray. {_ENDED}",
        "tags": ["rlhf-ray", "ray"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": _variables()},
        "panels": list(_place(rows)),
    }


def _row(group: ChartGroup, stage: str) -> tuple[str, list[Panel]]:
    # Faults are exported as events, which have panels of their own.
    return group.title, [_chart_panel(chart, stage) for chart in group.charts if chart.names != (FAULTS.name,)]


def _chart_panel(chart: Chart, stage: str) -> Panel:
    """A chart of the report as a panel, with one series for each metric and run, however many processes a resumed run had."""
    selected = f'{_RUN}, stage=~"{stage}"'
    queries = []
    for pattern in chart.names:
        prefix = pattern.removesuffix("*")
        if prefix == pattern:
            labels = "{{run}} {{stage}}" if "*" in stage else "{{run}}"
            legend = f"{labels} {describe(pattern).label}"
            queries.append(Query(f"max by (run, stage) ({exported_name(pattern)}{{{selected}}})", legend))
            continue
        names = [
            f'__name__=~"{exported_name(prefix)}.+"',
            *(f'__name__!="{exported_name(n)}"' for n in chart.without),
        ]
        series = f"max by (run, __name__) ({{{', '.join(names)}, {selected}}})"
        part = f'label_replace({series}, "part", "$1", "__name__", "{exported_name(prefix)}(.+)")'
        queries.append(Query(part, "{{run}} {{part}}"))
    first = describe(chart.names[0].replace("*", "x_s" if chart.names[0] == "time/*" else "x"))
    described = (describe(name) for name in chart.names if not name.endswith("*"))
    return Panel(chart.title, first.unit, tuple(queries), "\n".join(f"{m.label}: {m.description}." for m in described))


def _event_panels() -> list[Panel]:
    events, alerts = RUN_METRICS
    # Not `increase`: a series that begins with its first event never increases to it.
    counted = f'sum by (run, kind) ({events.name}{{{_RUN}, kind=~"%s"}})'
    return [
        Panel(
            "Alerts", "",
            (Query(f"max by (run, alert) ({alerts.name}{{{_RUN}}}) > 0", "{{run}} {{alert}}"),),
            "Active alerts. The run's events and its report say what each means and what to do.",
        ),
        Panel(
            "Faults and departures so far", "",
            (Query(counted % "fault|departure|warning|alert", "{{run}} {{kind}}"),), events.description,
        ),
        Panel(
            "Drops, releases, checkpoints, joins so far", "",
            (Query(counted % "drop|release|checkpoint|join", "{{run}} {{kind}}"),),
        ),
    ]  # fmt: skip


def _serving_panels() -> list[Panel]:
    answered, errors, latency, done, worked, working, queued, healthy = (metric.name for metric in SERVING_METRICS)
    by_application, rate = "{{application}}", "[$__rate_interval]"

    def quantile(share: float, histogram: str) -> Query:
        buckets = f"sum by (le, application) (rate({histogram}_bucket{rate}))"
        return Query(f"histogram_quantile({share}, {buckets})", f"{by_application} p{100 * share:.0f}")

    return [
        Panel("Requests per second", "", (Query(f"sum by (application) (rate({answered}{rate}))", by_application),),
              "HTTP requests by application; the application of an endpoint is its gateway."),
        Panel("Latency of HTTP requests", "ms", (quantile(0.5, latency), quantile(0.99, latency)),
              "Until the end of the answer, including streamed answers."),
        Panel("Errors per second", "", (
            Query(f"sum by (application, error_code) (rate({errors}{rate}))", f"{by_application} {{{{error_code}}}}"),
        )),
        Panel("Requests per second, by version", "", (Query(f"sum by (application) (rate({done}{rate}))", by_application),),
              "Each version is an application, and so is the reward model."),
        Panel("Latency of replicas", "ms", (quantile(0.5, worked), quantile(0.99, worked))),
        Panel("Replicas", "", (Query(f"sum by (application) ({healthy})", by_application),)),
        Panel("Requests worked on and waiting", "", (
            Query(f"sum by (application) ({working})", f"{by_application} worked on"),
            Query(f"sum by (application) ({queued})", f"{by_application} waiting"),
        )),
    ]  # fmt: skip


def _variables() -> list[dict[str, Any]]:
    query = 'label_values({__name__=~"ray_rlhf_.+"}, run)'
    source = {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    run = {"name": "run", "label": "run", "type": "query", "datasource": _source(), "definition": query}
    run |= {"query": {"query": query, "refId": "runs"}, "refresh": 2, "sort": 1, "multi": True, "includeAll": True}
    return [source, run | {"allValue": ".*", "current": {"text": ["All"], "value": ["$__all"]}}]


def _source() -> dict[str, str]:
    return {"type": "prometheus", "uid": "${datasource}"}


def _place(rows: Iterable[tuple[str, Sequence[Panel]]]) -> Iterable[dict[str, Any]]:
    """Place three panels next to each other below the title of each row."""
    top = number = 0
    for title, panels in rows:
        number += 1
        yield {"id": number, "type": "row", "title": title, "collapsed": False, "panels": []} | {
            "gridPos": {"x": 0, "y": top, "w": 24, "h": 1}
        }
        for at, panel in enumerate(panels):
            number += 1
            place = {"x": at % _COLUMNS * _WIDTH, "y": top + 1 + at // _COLUMNS * _HEIGHT, "w": _WIDTH, "h": _HEIGHT}
            yield _panel_json(panel, number) | {"gridPos": place}
        top += 1 + -(-len(panels) // _COLUMNS) * _HEIGHT


def _panel_json(panel: Panel, number: int) -> dict[str, Any]:
    unit = _UNITS.get(panel.unit, f"suffix: {panel.unit}")
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": _source(),
        "fieldConfig": {
            "defaults": {"unit": unit, "custom": {"lineWidth": 2, "fillOpacity": 0, "showPoints": "auto"}},
            "overrides": [],
        },
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {
                "refId": chr(ord("A") + at),
                "datasource": _source(),
                "expr": query.expression,
                "legendFormat": query.legend,
            }
            for at, query in enumerate(panel.queries)
        ],
    }


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=1, ensure_ascii=False))
