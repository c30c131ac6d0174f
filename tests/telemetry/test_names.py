"""Every metric that this package records is in the catalogue, and docs/metrics.md shows the catalogue."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from docs.make_metrics import metric_table
from rlhf_ray.algorithms.reliability import MeantLabels
from rlhf_ray.algorithms.statistics import summarise
from rlhf_ray.learner.objectives import LanguageDiagnostics
from rlhf_ray.learner.reward_objectives import ComparisonDiagnostics, ScoreDiagnostics
from rlhf_ray.rewards.http import Usage
from rlhf_ray.telemetry.names import FAMILIES, METRICS, exported_name, find_metric
from rlhf_ray.telemetry.prometheus import RUN_METRICS, SERVING_METRICS

ROOT = Path(__file__).parents[2]


def test_the_page_is_up_to_date():
    """Otherwise: python -m docs.make_metrics > docs/metrics.md"""
    assert (ROOT / "docs" / "metrics.md").read_text() == metric_table()


def test_names_that_stand_in_the_code_are_in_the_catalogue():
    """Literals of the form subject/figure whose subject is one of the catalogue's; but for those that end in a variable."""
    subjects = {name.partition("/")[0] for name in METRICS if "/" in name} | {"service", "time", "idle"}
    literal = re.compile(rf'f?"((?:{"|".join(sorted(subjects))})/[a-z0-9_/{{}}.]+)"')
    found = {
        (path.name, name)
        for path in (ROOT / "rlhf_ray").rglob("*.py")
        for name in literal.findall(path.read_text())
        if path.name != "names.py" and not name.endswith("{name}") and not name.endswith("{figure}")
    }
    assert len(found) > 50, "the expression finds none"
    assert not {place for place in found if find_metric(re.sub(r"\{.*?\}", "x", place[1])) is None}


@pytest.mark.parametrize("prefix", ["", "heldout/"])
def test_what_a_supervised_stage_measures_is_in_the_catalogue(prefix):
    one = summarise(torch.tensor([1.0, 2.0]), torch.ones(2, dtype=torch.bool))
    meant = MeantLabels(torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    measured = (
        LanguageDiagnostics(one, one),
        ComparisonDiagnostics(one, one, one, meant),
        ScoreDiagnostics(one, one, one),
    )
    names = {name for diagnostics in measured for name in diagnostics.metrics()}
    assert len(names) == 6 and all(find_metric(f"{prefix}{name}") for name in names)


def test_everything_that_a_service_may_cost_is_a_family():
    usage = Usage(1, 1, 1, 1, 1, 1, 1, 1.0, 1.0, 1, 1, 1.0, 1, 1, 1.0)
    figures = usage.metrics("a/b")
    assert len(figures) == 12 and all(find_metric(name) for name in figures)
    assert find_metric("service/judge/flip_rate").label == "judge: flip rate"


@pytest.mark.parametrize("name", ["reward/meen", "time/rollout", "loss2", "service/judge/price", ""])
def test_unknown_names_are_not_in_the_catalogue(name):
    assert find_metric(name) is None


def test_every_entry_has_a_meaning_and_a_stage():
    for entry in (*METRICS.values(), *FAMILIES):
        assert entry.description and entry.stage and not entry.description.endswith(".")


def test_names_in_prometheus_are_distinct():
    names = [exported_name(name) for name in METRICS] + [
        series for e in (*RUN_METRICS, *SERVING_METRICS) for series in e.series
    ]
    assert len(set(names)) == len(names)
    assert FAMILIES[0].exported_name == "ray_rlhf_time_<phase>_s"
