"""Everything the report tells, read from a run's folder once.

Invariant: whatever part of a run is missing is None or empty here, and never an error: a report can be written of a
run that has only begun, of one that failed, and of real data, whose utility nobody knows.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rlhf_ray.telemetry.events import Event, read_events
from rlhf_ray.telemetry.jsonl import read_jsonl
from rlhf_ray.telemetry.metrics import read_metrics
from rlhf_ray.telemetry.run_folder import RunFolder

MAX_ANSWERS = 60
"""Prompts shown with their answers: enough to judge by eye, and a page that opens at once."""
MAX_EVENTS = 200
ROUTINE_EVENTS = frozenset({"checkpoint", "publication"})
"""Kinds that come with every step: counted, not listed."""


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
    stages: Mapping[str, list[dict[str, Any]]]
    """Metrics records of the stages `sft`, `reward_model` and `ppo`."""
    reward_quality: Mapping[str, Any] | None
    """Of the reward model on held-out labels."""
    evaluation: Mapping[str, Any] | None
    answers: tuple[Answers, ...]
    answers_total: int
    event_counts: Mapping[str, int]
    events: tuple[Event, ...]
    """The latest that are worth a line each."""
    config: str | None


def read_content(folder: RunFolder) -> Content:
    """Read a run's folder. Raises ValueError, naming file and line, where a file is damaged."""
    events = read_events(folder.events)
    notable = [event for event in events if event.kind not in ROUTINE_EVENTS]
    rows = list(read_jsonl(folder.evaluation_samples))
    return Content(
        name=folder.name,
        stages={stage: read_metrics(folder.stage_metrics(stage)) for stage in ("sft", "reward_model", "ppo")},
        reward_quality=_read_json(folder.reward_quality, "Train the reward model again to write it anew"),
        evaluation=_read_json(folder.evaluation, "Evaluate again to write it anew"),
        answers=tuple(_answers(row) for row in islice(rows, MAX_ANSWERS)),
        answers_total=len(rows),
        event_counts=dict(Counter(event.kind for event in events).most_common()),
        events=tuple(notable[-MAX_EVENTS:]),
        config=folder.config.read_text(encoding="utf-8") if folder.config.exists() else None,
    )


def _read_json(path: Path, remedy: str) -> Mapping[str, Any] | None:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}). {remedy}.") from error


def _answers(row: Mapping[str, Any]) -> Answers:
    return Answers(tuple(row["prompt"]), row["answers"], row.get("rewards") or {}, row.get("utility") or {})
