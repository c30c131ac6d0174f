"""From the metrics of runs to drawn cards: the charts of one run, or the same charts with a line for each of several.

Invariant: a chart whose figures were never recorded is left out and its title is listed, so that nothing is missing
silently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from rlhf_ray.report.curves import curve, stacked
from rlhf_ray.report.svg import Line, line_chart, stacked_chart
from rlhf_ray.report.table import Table
from rlhf_ray.telemetry.console import figure
from rlhf_ray.telemetry.names import FAULTS, describe


@dataclass(frozen=True)
class Plan:
    """One chart."""

    title: str
    names: tuple[str, ...]
    """Metrics; one that ends in `*` stands for all names with that beginning."""
    without: tuple[str, ...] = ()
    """Of those, what another chart shows."""


Question = tuple[str, str, tuple[Plan, ...]]
"""A section's title, what it is for, and its charts."""

PPO: tuple[Question, ...] = (
    ("What it learns", "What the policy is paid for, and how far it moves away from where it began.", (
        Plan("Reward", ("reward/mean", "reward/shaped_mean")),
        Plan("KL to the reference", ("kl/sequence",)),
        Plan("KL coefficient", ("kl/coefficient",)),
        Plan("Response length", ("response/length_mean", "response/length_max")),
        Plan("Responses that end themselves", ("response/eos_rate",)),
        Plan("Entropy", ("policy/entropy",)),
        Plan("Reward by source", ("reward/part/*",)),
        Plan("Discriminator: told apart", ("discriminator/accuracy", "discriminator/accuracy_demonstrations")),
        Plan("Discriminator: score gap", ("discriminator/score_gap",)),
    )),
    ("How it learns", "Whether the updates are sound: small steps, a critic that explains, gradients in bounds.", (
        Plan("Policy loss", ("policy/loss",)),
        Plan("Value loss", ("value/loss",)),
        Plan("Clip fraction", ("policy/clip_fraction", "value/clip_fraction")),
        Plan("KL of an update", ("policy/approx_kl",)),
        Plan("Value: explained variance", ("value/explained_variance",)),
        Plan("Values and returns", ("value/mean", "return/mean")),
        Plan("Probability ratio", ("policy/ratio_mean", "policy/ratio_max")),
        Plan("Gradient norm", ("policy/grad_norm", "value/grad_norm")),
        Plan("Learning rate", ("policy/learning_rate", "value/learning_rate")),
    )),
    ("How it runs", "Whether engine and learner agree, where the time goes, and what failed on the way.", (
        Plan("Engine against learner, |Δ logp|", ("engine/logprob_difference_mean", "engine/logprob_difference_max")),
        Plan("Staleness", ("staleness/mean", "staleness/max")),
        Plan("Samples per second", ("throughput/samples_per_s",)),
        Plan("Tokens per second", ("throughput/*",), without=("throughput/samples_per_s",)),
        Plan("Idle share", ("idle/*",)),
        Plan("Faults so far", (FAULTS.name,)),
    )),
)  # fmt: skip
TIME: Question = ("Where the time goes", "Wall time of a step, and of it the time in which each phase was active.", (
    Plan("Time per step", ("time/*",)),
))  # fmt: skip
"""For several runs; of one run the phases are stacked."""
SFT: Question = ("Fine-tuning", "The base model learns to answer from demonstrations.", (
    Plan("Loss", ("loss", "heldout/loss")),
    Plan("Learning rate", ("learning_rate",)),
    Plan("Gradient norm", ("grad_norm",)),
))  # fmt: skip
REWARD_MODEL: Question = ("Reward model", "A model learns from choices between answers which one people prefer.", (
    Plan("Loss", ("loss", "heldout/loss")),
    Plan("Pairs ordered rightly", ("accuracy", "heldout/accuracy")),
    Plan("Learning rate", ("learning_rate",)),
))  # fmt: skip


SERIES_COLOURS = 8
"""How many `--series-N` the style sheet has."""


@dataclass(frozen=True)
class Key:
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
    keys: tuple[Key, ...]
    note: str = ""


@dataclass(frozen=True)
class Section:
    """Charts that answer one question."""

    title: str
    lead: str
    cards: tuple[Card, ...]
    absent: tuple[str, ...]
    """Titles of charts without data."""


@dataclass(frozen=True)
class _Source:
    """Where a line comes from."""

    label: str
    table: Table
    name: str
    """Of the metric."""
    colour: int


def ppo_sections(table: Table) -> list[Section]:
    """The charts of PPO. The last section begins with the time per phase."""
    sections = [_section(table, question) for question in PPO]
    if phases := _time_card(table):
        sections[-1] = Section(
            sections[-1].title, sections[-1].lead, (phases, *sections[-1].cards), sections[-1].absent
        )
    return sections


def stage_sections(sft: Table, reward_model: Table) -> list[Section]:
    """The charts of the stages before PPO; none for a stage that recorded nothing."""
    return [_section(table, question) for table, question in ((sft, SFT), (reward_model, REWARD_MODEL)) if len(table)]


def compared_sections(stages: Mapping[str, Mapping[str, Table]]) -> list[Section]:
    """The same charts of several runs, a line for each and a chart for each figure; none for a stage that no run recorded.

    Args:
        stages: stage -> label of the run -> its metrics; the order of the runs is that of their colours.
    """
    questions = [*(("ppo", question) for question in (*PPO, TIME)), ("sft", SFT), ("reward_model", REWARD_MODEL)]
    return [
        _compared_section(stages[stage], question)
        for stage, question in questions
        if any(len(table) for table in stages[stage].values())
    ]


def _section(table: Table, question: Question) -> Section:
    title, lead, plans = question
    cards = [(plan.title, _line_card(plan.title, _lines_of_run(table, plan))) for plan in plans]
    return Section(title, lead, *_split(cards))


def _compared_section(runs: Mapping[str, Table], question: Question) -> Section:
    title, lead, plans = question
    cards: list[tuple[str, Card | None]] = []
    for plan in plans:
        names = list(dict.fromkeys(name for table in runs.values() for name in _expand(table, plan)))
        for name in names:
            label = describe(name).label
            said = name in plan.names and (len(plan.names) == 1 or label.lower() in plan.title.lower())
            part = plan.title if said else f"{plan.title}: {label}"
            lines = [_Source(label, table, name, at) for at, (label, table) in enumerate(runs.items(), start=1)]
            cards.append((part, _line_card(part, lines)))
        if not names:
            cards.append((plan.title, None))
    return Section(title, lead, *_split(cards))


def _split(cards: Sequence[tuple[str, Card | None]]) -> tuple[tuple[Card, ...], tuple[str, ...]]:
    drawn = tuple(card for _, card in cards if card is not None)
    return drawn, tuple(title for title, card in cards if card is None)


def _lines_of_run(table: Table, plan: Plan) -> list[_Source]:
    known = [name for name in _expand(table, plan) if np.isfinite(table.column(name)[1]).any()][:SERIES_COLOURS]
    return [_Source(describe(name).label, table, name, colour) for colour, name in enumerate(known, start=1)]


def _expand(table: Table, plan: Plan) -> list[str]:
    """The metrics that a plan stands for."""
    found: list[str] = []
    for pattern in plan.names:
        beginning = pattern.removesuffix("*")
        found += [name for name in table.names if name.startswith(beginning)] if beginning != pattern else [pattern]
    return [name for name in found if name not in plan.without]


def _line_card(title: str, sources: Sequence[_Source]) -> Card | None:
    drawn = [(source, found) for source in sources if (found := curve(source.table, source.name)) is not None]
    if not drawn:
        return None
    metrics = [describe(source.name) for source, _ in drawn]
    return Card(
        title=title,
        svg=line_chart(title, [Line(source.label, found, source.colour) for source, found in drawn], metrics[0].unit),
        keys=tuple(
            Key(source.label, figure(found.last, metric.unit), source.colour, metric.description)
            for (source, found), metric in zip(drawn, metrics, strict=True)
        ),
        note=_lost(sum(found.not_finite for _, found in drawn)),
    )


def _lost(count: int) -> str:
    if count == 0:
        return ""
    return (
        "1 recorded value was not a finite number" if count == 1 else f"{count} recorded values were not finite numbers"
    )


def _time_card(table: Table) -> Card | None:
    """Phases stacked in the order of their share, the longest at the bottom."""
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
        keys=tuple(
            Key(metric.label, figure(table.last(metric.name), "s"), colour, metric.description)
            for colour, metric in enumerate(metrics, start=1)
        ),
        note="Dotted: the whole step. Phases that overlap reach above it.",
    )
