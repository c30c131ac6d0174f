"""The Grafana dashboard against a real exporter: every metric that a panel queries is exported."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from cluster.monitoring.make_dashboard import dashboard
from rlhf_ray.config.telemetry import AlertsConfig
from rlhf_ray.runs.events import EventLog
from rlhf_ray.runs.metrics import MetricsLog
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.telemetry.alerts import AlertLog
from rlhf_ray.telemetry.names import EVERY, FAMILIES, METRICS, PPO, exported_name
from rlhf_ray.telemetry.prometheus import RUN_METRICS, SERVING_METRICS
from tests.exporter import names_of, scrape

ROOT = Path(__file__).parents[2]
SAVED = ROOT / "cluster" / "monitoring" / "dashboard.json"
# A step of configs/quickstart.yaml; the rest of the catalogue is recorded too.
STEP = {
    "kl/coefficient": 0.03, "response/length_mean": 38.68, "response/eos_rate": 1.0, "throughput/samples_per_s": 62.49,
    "reward/mean": 1.772, "reward/std": 0.327, "reward/part/model": 1.772, "kl/sequence": 4.926, "policy/entropy": 0.1119,
    "engine/logprob_difference_mean": 5.37e-08, "throughput/rollout_tokens_per_s": 7376.0, "time/step_s": 4.097,
    "time/rollout_s": 1.343, "time/update_s": 1.54, "idle/rollout": 0.672, "idle/learner": 0.477,
}  # fmt: skip


def queries(board: dict) -> list[str]:
    return [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]


def metrics_of(expression: str) -> tuple[set[str], set[str]]:
    """The metrics in a PromQL expression: exact names, and regular expressions of names."""
    patterns = set(re.findall(r'__name__=~"([^"]+)"', expression))
    return set(re.findall(r"\bray_\w+", re.sub(r'"[^"]*"', "", expression))), patterns


def missing(board: dict, exported: set[str]) -> set[str]:
    """Metrics that panels query but that are not exported."""
    exact, patterns = zip(*map(metrics_of, queries(board)), strict=True)
    unmatched = {p for p in set().union(*patterns) if not any(re.fullmatch(p, name) for name in exported)}
    return (set().union(*exact) - exported) | unmatched


@pytest.fixture(scope="module")
def exported(ray_cluster, tmp_path_factory) -> dict[str, float]:
    """Series of a run of all stages that has recorded every figure of the catalogue, an event of two kinds, and an alert."""
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "watched")
    supervised = {name: 0.5 for name, metric in METRICS.items() if metric.stage != PPO}
    ppo = {name: 0.5 for name, metric in METRICS.items() if metric.stage in (PPO, EVERY)}
    families = {re.sub(r"<\w+>", "some", family.template): 0.25 for family in FAMILIES}
    with EventLog(folder.events) as events, MetricsLog(folder) as log, MetricsLog(folder, "sft") as sft:
        alerts = AlertLog(AlertsConfig(kl=4.0, patience=1), folder, events, [])
        alerts.observe(log.log(1, ppo | families | STEP))
        sft.log(1, supervised)
        events.emit("fault", "a worker died")
        events.emit("fault", "and another")
        count = len(ppo | supervised | families | STEP)
        yield scrape(
            lambda series: len([n for n in names_of(series) if n.startswith("ray_rlhf_")]) >= count + len(RUN_METRICS)
        )


def value(series: dict[str, float], name: str, **labels: str) -> float:
    found = [
        v for n, v in series.items() if n.startswith(f"{name}{{") and all(f'{k}="{w}"' in n for k, w in labels.items())
    ]
    assert len(found) == 1, f"{name} {labels}: {found}"
    return found[0]


def test_the_saved_dashboard_is_up_to_date():
    """Otherwise: python -m cluster.monitoring.make_dashboard > cluster/monitoring/dashboard.json"""
    assert json.loads(SAVED.read_text()) == dashboard()


def test_figures_are_exported_with_their_run_and_stage(exported):
    assert value(exported, "ray_rlhf_reward_mean", run="watched", stage="ppo") == 1.772
    assert value(exported, "ray_rlhf_loss", run="watched", stage="sft") == 0.5
    assert value(exported, "ray_rlhf_events_total", run="watched", kind="fault") == 2
    assert value(exported, "ray_rlhf_events_total", run="watched", kind="alert") == 1
    assert value(exported, "ray_rlhf_alert", run="watched", alert="kl_high") == 1
    assert value(exported, "ray_rlhf_alert", run="watched", alert="eos_falling") == 0


def test_the_whole_catalogue_is_exported_by_its_names_of(exported):
    assert {exported_name(name) for name in METRICS} | {metric.name for metric in RUN_METRICS} <= names_of(exported)


def test_every_panel_queries_exported_metrics(exported):
    """Ray Serve's are exported where an endpoint runs: `tests/serving` scrapes one for those."""
    serving = {series for metric in SERVING_METRICS for series in metric.series}
    assert not missing(json.loads(SAVED.read_text()), names_of(exported) | serving)


@pytest.mark.parametrize(
    "query", ["max(ray_rlhf_reward_meen)", '{__name__=~"ray_rlhf_idel_.+"}', "rate(ray_serve_nothing[1m])"]
)
def test_a_metric_that_is_not_exported_is_found(exported, query):
    board = dashboard()
    board["panels"].append({"targets": [{"expr": query}]})
    assert (
        len(missing(board, names_of(exported) | {series for metric in SERVING_METRICS for series in metric.series}))
        == 1
    )


def test_panels_do_not_overlap_and_have_ids_of_their_own():
    panels = dashboard()["panels"]
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells) and max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_prometheus_reads_the_file_that_ray_writes():
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    (job,) = yaml.safe_load((SAVED.parent / "prometheus.yml").read_text())["scrape_configs"]
    (discovery,) = job["file_sd_configs"]
    assert [Path(path).name for path in discovery["files"]] == [PROMETHEUS_SERVICE_DISCOVERY_FILE]
