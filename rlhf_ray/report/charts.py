"""The charts of the report: which metrics they show, and how they are drawn for one run or with a line for each of several runs.

Invariant: a chart whose metrics were never recorded is left out and its title is listed, so that nothing is missing silently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from markupsafe import Markup

from rlhf_ray.report.curves import curve, stacked
from rlhf_ray.report.svg import Line, line_chart, stacked_chart
from rlhf_ray.report.table import Table
from rlhf_ray.telemetry.console import figure
from rlhf_ray.telemetry.names import FAULTS, describe


@dataclass(frozen=True)
class Chart:
    """A chart and the metrics that it shows."""

    title: str
    names: tuple[str, ...]
    """Names of metrics; one that ends in `*` stands for all metrics whose names begin with it."""
    without: tuple[str, ...] = ()
    """Metrics that are left out because another chart shows them."""


@dataclass(frozen=True)
class ChartGroup:
    """A section of the report."""

    title: str
    lead: str
    """What the charts are for."""
    charts: tuple[Chart, ...]


PPO: tuple[ChartGroup, ...] = (
    ChartGroup("What it learns", "The reward of the policy, and how far it moves away from the reference.", (
        Chart("Reward", ("reward/mean", "reward/shaped_mean")),
        Chart("KL to the reference", ("kl/sequence",)),
        Chart("KL coefficient", ("kl/coefficient",)),
        Chart("Response length", ("response/length_mean", "response/length_max")),
        Chart("EOS rate", ("response/eos_rate",)),
        Chart("Entropy", ("policy/entropy",)),
        Chart("Reward by source", ("reward/part/*",)),
        Chart("Discriminator: accuracy", ("discriminator/accuracy", "discriminator/accuracy_demonstrations")),
        Chart("Discriminator: score gap", ("discriminator/score_gap",)),
    )),
    ChartGroup("How it learns", "Whether updates are small, the critic explains the returns, and gradients stay bounded.", (
        Chart("Policy loss", ("policy/loss",)),
        Chart("Value loss", ("value/loss",)),
        Chart("Clip fraction", ("policy/clip_fraction", "value/clip_fraction")),
        Chart("KL of an update", ("policy/approx_kl",)),
        Chart("Value: explained variance", ("value/explained_variance",)),
        Chart("Values and returns", ("value/mean", "return/mean")),
        Chart("Probability ratio", ("policy/ratio_mean", "policy/ratio_max")),
        Chart("Gradient norm", ("policy/grad_norm", "value/grad_norm")),
        Chart("Learning rate", ("policy/learning_rate", "value/learning_rate")),
    )),
    ChartGroup("How it runs", "Whether rollout engine and learner agree, where the time goes, and what failed.", (
        Chart("Engine and learner, |Δ logp|", ("engine/logprob_difference_mean", "engine/logprob_difference_max")),
        Chart("Staleness", ("staleness/mean", "staleness/max")),
        Chart("Samples per second", ("throughput/samples_per_s",)),
        Chart("Tokens per second", ("throughput/*",), without=("throughput/samples_per_s",)),
        Chart("Idle share", ("idle/*",)),
        Chart("Faults so far", (FAULTS.name,)),
    )),
)  # fmt: skip
TIME = ChartGroup("Where the time goes", "Wall time of a step, and the time in which each phase was active.", (
    Chart("Time per step", ("time/*",)),
))  # fmt: skip
"""For several runs. For one run the phases are stacked."""
SFT = ChartGroup("Fine-tuning", "The base model learns to answer from demonstrations.", (
    Chart("Loss", ("loss", "heldout/loss")),
    Chart("Learning rate", ("learning_rate",)),
    Chart("Gradient norm", ("grad_norm",)),
))  # fmt: skip
REWARD_MODEL = ChartGroup("Reward model", "A model learns from comparisons which of two answers people prefer.", (
    Chart("Loss", ("loss", "heldout/loss")),
    Chart("Pairs ordered correctly", ("accuracy", "heldout/accuracy")),
    Chart("Learning rate", ("learning_rate",)),
))  # fmt: skip


SERIES_COLOURS = 8
"""Number of colours `--series-N` in the style sheet."""


@dataclass(frozen=True)
class LegendEntry:
    """An entry of a chart's legend."""

    label: str
    last: str
    colour: int
    description: str


@dataclass(frozen=True)
class Card:
    """One drawn chart."""

    title: str
    svg: Markup
    legend: tuple[LegendEntry, ...]
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A chart group with its drawn charts."""

    title: str
    lead: str
    cards: tuple[Card, ...]
    absent: tuple[str, ...]
    """Titles of the charts without data."""


@dataclass(frozen=True)
class _Series:
    """The data of one line."""

    label: str
    table: Table
    name: str
    """Name of the metric."""
    colour: int


def ppo_sections(table: Table) -> list[Section]:
    """The charts of PPO. The last section begins with the time per phase."""
    sections = [_section(table, group) for group in PPO]
    if phases := _time_card(table):
        sections[-1] = replace(sections[-1], cards=(phases, *sections[-1].cards))
    return sections


def stage_sections(sft: Table, reward_model: Table) -> list[Section]:
    """The charts of the stages before PPO, except for stages that recorded nothing."""
    return [_section(table, group) for table, group in ((sft, SFT), (reward_model, REWARD_MODEL)) if len(table)]


def compared_sections(stages: Mapping[str, Mapping[str, Table]]) -> list[Section]:
    """The charts of several runs, one for each metric with a line for each run, except for stages that no run recorded.

    Args:
        stages: metrics by stage and by label of the run; the order of the runs determines their colours.
    """
    groups = [*(("ppo", group) for group in (*PPO, TIME)), ("sft", SFT), ("reward_model", REWARD_MODEL)]
    return [
        _compared_section(stages[stage], group)
        for stage, group in groups
        if any(len(table) for table in stages[stage].values())
    ]


def _section(table: Table, group: ChartGroup) -> Section:
    cards = [(chart.title, _line_card(chart.title, _series_of_run(table, chart))) for chart in group.charts]
    return _with_absent(group, cards)


def _compared_section(runs: Mapping[str, Table], group: ChartGroup) -> Section:
    cards: list[tuple[str, Card | None]] = []
    for chart in group.charts:
        names = list(dict.fromkeys(name for table in runs.values() for name in _metric_names(table, chart)))
        for name in names:
            label = describe(name).label
            in_title = name in chart.names and (len(chart.names) == 1 or label.lower() in chart.title.lower())
            title = chart.title if in_title else f"{chart.title}: {label}"
            series = [_Series(run, table, name, colour) for colour, (run, table) in enumerate(runs.items(), start=1)]
            cards.append((title, _line_card(title, series)))
        if not names:
            cards.append((chart.title, None))
    return _with_absent(group, cards)


def _with_absent(group: ChartGroup, cards: Sequence[tuple[str, Card | None]]) -> Section:
    drawn = tuple(card for _, card in cards if card is not None)
    return Section(group.title, group.lead, drawn, tuple(title for title, card in cards if card is None))


def _series_of_run(table: Table, chart: Chart) -> list[_Series]:
    names = [name for name in _metric_names(table, chart) if np.isfinite(table.column(name)[1]).any()]
    return [
        _Series(describe(name).label, table, name, colour)
        for colour, name in enumerate(names[:SERIES_COLOURS], start=1)
    ]


def _metric_names(table: Table, chart: Chart) -> list[str]:
    """The metrics that a chart shows, with patterns replaced by the names in the table."""
    found: list[str] = []
    for pattern in chart.names:
        prefix = pattern.removesuffix("*")
        found += [name for name in table.names if name.startswith(prefix)] if prefix != pattern else [pattern]
    return [name for name in found if name not in chart.without]


def _line_card(title: str, series: Sequence[_Series]) -> Card | None:
    drawn = [(one, found) for one in series if (found := curve(one.table, one.name)) is not None]
    if not drawn:
        return None
    metrics = [describe(one.name) for one, _ in drawn]
    return Card(
        title=title,
        svg=line_chart(title, [Line(one.label, found, one.colour) for one, found in drawn], metrics[0].unit),
        legend=tuple(
            LegendEntry(one.label, figure(found.last, metric.unit), one.colour, metric.description)
            for (one, found), metric in zip(drawn, metrics, strict=True)
        ),
        note=_not_finite_note(sum(found.not_finite for _, found in drawn)),
    )


def _not_finite_note(count: int) -> str:
    if count == 0:
        return ""
    return (
        "1 recorded value was not a finite number" if count == 1 else f"{count} recorded values were not finite numbers"
    )


def _time_card(table: Table) -> Card | None:
    """The phases of a step, stacked by total time with the longest at the bottom."""
    phases = [name for name in table.names if name.startswith("time/") and name != "time/step_s"]
    if not phases:
        return None
    steps, layers = stacked(table, [*phases, "time/step_s"])
    total = layers[-1]
    order = np.argsort(-layers[:-1].sum(axis=1), kind="stable")[:SERIES_COLOURS]
    metrics = [describe(phases[index]) for index in order]
    return Card(
        title="Time per step",
        svg=stacked_chart("Time per step", steps, [metric.label for metric in metrics], layers[order], total),
        legend=tuple(
            LegendEntry(metric.label, figure(table.last(metric.name), "s"), colour, metric.description)
            for colour, metric in enumerate(metrics, start=1)
        ),
        note="Dotted: the whole step. Phases that overlap add up to more.",
    )
