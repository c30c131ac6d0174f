"""Which charts a report has: from the records of the stages to drawn cards, in the order in which a person asks.

Invariant: a chart whose figures were never recorded is left out and its title is listed, so that nothing is missing
silently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from rlhf_ray.telemetry.names import describe
from rlhf_ray.telemetry.report.curves import curve, stacked
from rlhf_ray.telemetry.report.figures import figure
from rlhf_ray.telemetry.report.svg import Line, line_chart, stacked_chart

Records = Sequence[dict[str, Any]]
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
class _Plan:
    title: str
    names: tuple[str, ...]
    """Metrics; one that ends in `*` stands for all names with that beginning."""


_PPO = (
    ("What it learns", "What the policy is paid for, and how far it moves away from where it began.", (
        _Plan("Reward", ("reward/mean", "reward/shaped_mean")),
        _Plan("KL to the reference", ("kl/sequence",)),
        _Plan("KL coefficient", ("kl/coefficient",)),
        _Plan("Response length", ("response/length_mean", "response/length_max")),
        _Plan("Responses that end themselves", ("response/eos_rate",)),
        _Plan("Entropy", ("policy/entropy",)),
        _Plan("Reward by source", ("reward/part/*",)),
        _Plan("Discriminator: told apart", ("discriminator/accuracy", "discriminator/accuracy_demonstrations")),
        _Plan("Discriminator: score gap", ("discriminator/score_gap",)),
    )),
    ("How it learns", "Whether the updates are sound: small steps, a critic that explains, gradients in bounds.", (
        _Plan("Policy loss", ("policy/loss",)),
        _Plan("Value loss", ("value/loss",)),
        _Plan("Clip fraction", ("policy/clip_fraction", "value/clip_fraction")),
        _Plan("KL of an update", ("policy/approx_kl",)),
        _Plan("Value: explained variance", ("value/explained_variance",)),
        _Plan("Values and returns", ("value/mean", "return/mean")),
        _Plan("Probability ratio", ("policy/ratio_mean", "policy/ratio_max")),
        _Plan("Gradient norm", ("policy/grad_norm", "value/grad_norm")),
        _Plan("Learning rate", ("policy/learning_rate", "value/learning_rate")),
    )),
    ("How it runs", "Whether engine and learner agree, and where the time goes.", (
        _Plan("Engine against learner, |Δ logp|", ("engine/logprob_difference_mean", "engine/logprob_difference_max")),
        _Plan("Staleness", ("staleness/mean", "staleness/max")),
        _Plan("Samples per second", ("throughput/samples_per_s",)),
        _Plan("Tokens per second", ("throughput/*",)),
        _Plan("Idle share", ("idle/*",)),
    )),
)  # fmt: skip
_SFT = ("Fine-tuning", "The base model learns to answer from demonstrations.", (
    _Plan("Loss", ("loss", "heldout/loss")),
    _Plan("Learning rate", ("learning_rate",)),
    _Plan("Gradient norm", ("grad_norm",)),
))  # fmt: skip
_REWARD_MODEL = ("Reward model", "A model learns from choices between answers which one people prefer.", (
    _Plan("Loss", ("loss", "heldout/loss")),
    _Plan("Pairs ordered rightly", ("accuracy", "heldout/accuracy")),
    _Plan("Learning rate", ("learning_rate",)),
))  # fmt: skip


def ppo_sections(records: Records) -> list[Section]:
    """The charts of PPO. The last section begins with the time per phase."""
    sections = [_section(records, *plan) for plan in _PPO]
    if phases := _time_card(records):
        sections[-1] = Section(
            sections[-1].title, sections[-1].lead, (phases, *sections[-1].cards), sections[-1].absent
        )
    return sections


def stage_sections(sft: Records, reward_model: Records) -> list[Section]:
    """The charts of the stages before PPO; none for a stage that recorded nothing."""
    return [_section(records, *plan) for records, plan in ((sft, _SFT), (reward_model, _REWARD_MODEL)) if records]


def _section(records: Records, title: str, lead: str, plans: Sequence[_Plan]) -> Section:
    cards = [(plan.title, _card(records, plan)) for plan in plans]
    return Section(
        title=title,
        lead=lead,
        cards=tuple(card for _, card in cards if card is not None),
        absent=tuple(title for title, card in cards if card is None),
    )


def _card(records: Records, plan: _Plan) -> Card | None:
    names = [name for pattern in plan.names for name in _expand(records, pattern)]
    curves = [(describe(name), found) for name in names[:SERIES_COLOURS] if (found := curve(records, name))]
    if not curves:
        return None
    unit = curves[0][0].unit
    lines = [Line(metric.label, found, colour) for colour, (metric, found) in enumerate(curves, start=1)]
    lost = sum(found.not_finite for _, found in curves)
    return Card(
        title=plan.title,
        svg=line_chart(plan.title, lines, unit),
        keys=tuple(
            Key(metric.label, figure(found.last, metric.unit), colour, metric.description)
            for colour, (metric, found) in enumerate(curves, start=1)
        ),
        note=_lost(lost),
    )


def _lost(count: int) -> str:
    if count == 0:
        return ""
    return (
        "1 recorded value was not a finite number" if count == 1 else f"{count} recorded values were not finite numbers"
    )


def _expand(records: Records, pattern: str) -> list[str]:
    """The names that a plan's entry stands for, in the order of their appearance."""
    if not pattern.endswith("*"):
        return [pattern]
    beginning = pattern[:-1]
    found = dict.fromkeys(name for record in _ends(records) for name in record if name.startswith(beginning))
    return [name for name in found if name != "throughput/samples_per_s"]


def _time_card(records: Records) -> Card | None:
    """Phases stacked in the order of their share, the longest at the bottom."""
    found = dict.fromkeys(name for record in _ends(records) for name in record if name.startswith("time/"))
    phases = [name for name in found if name != "time/step_s"]
    if not phases:
        return None
    steps, layers = stacked(records, [*phases, "time/step_s"])
    total = layers[-1]
    order = np.argsort(-layers[:-1].sum(axis=1), kind="stable")[:SERIES_COLOURS]
    metrics = [describe(phases[index]) for index in order]
    last = records[-1]
    return Card(
        title="Time per step",
        svg=stacked_chart("Time per step", steps, [metric.label for metric in metrics], layers[order], total),
        keys=tuple(
            Key(metric.label, figure(last.get(metric.name), "s"), colour, metric.description)
            for colour, metric in enumerate(metrics, start=1)
        ),
        note="Dotted: the whole step. Phases that overlap reach above it.",
    )


def _ends(records: Records) -> Records:
    """The records in which names are looked up: the first and the last hundred, as runs do not rename their figures."""
    return records if len(records) <= 200 else [*records[:100], *records[-100:]]
