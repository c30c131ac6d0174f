"""Everything that a report tells of a run, as data.

Invariant: whatever part of a run is missing is None or empty here, and never an error: a report can be written of a
run that has only begun, of one that failed, and of real data, whose utility nobody knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_ray.report.table import Table
from rlhf_ray.runs.events import Event
from rlhf_ray.telemetry.alert_log import RaisedAlert

MAX_ANSWERS = 60
"""Prompts shown with their answers: enough to judge by eye, and a page that opens at once."""
MAX_EVENTS = 200
ROUTINE_EVENTS = frozenset({"checkpoint", "publication"})
"""Kinds that come with every step: counted, not listed."""
STAGES = ("sft", "reward_model", "ppo")
"""Those with metrics."""


@dataclass(frozen=True)
class Answers:
    """One held-out prompt and what each policy answered."""

    prompt: tuple[Mapping[str, str], ...]
    answers: Mapping[str, str]
    rewards: Mapping[str, float | None]
    utility: Mapping[str, float | None]


@dataclass(frozen=True)
class Content:
    """A run, as the report sees it."""

    name: str
    stages: Mapping[str, Table]
    """Metrics of `STAGES`."""
    reward_quality: Mapping[str, Any] | None
    """Of the reward model on held-out labels."""
    evaluation: Mapping[str, Any] | None
    answers: Sequence[Answers]
    event_counts: Mapping[str, int]
    events: tuple[Event, ...]
    """The latest that are worth a line each."""
    config: str | None
    alerts: tuple[RaisedAlert, ...] = ()
    """All, in the order in which they began."""
    problems: tuple[str, ...] = ()
    """What could not be read, as sentences that name file and line."""
