"""Reads what a report shows from a run's folder, once or repeatedly while the run grows.

Invariants: what was read before is not parsed again; damage in one file leaves the others readable and is reported in
`Content.problems`; what a run has not written yet is missing, which is not a problem.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.errors import InputError
from rlhf_ray.report.curves import with_fault_counts
from rlhf_ray.report.table import Table
from rlhf_ray.runs.events import Event, parse_event
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.runs.tail import Tail, fingerprint
from rlhf_ray.telemetry.alerts import RaisedAlert, raised_alerts

MAX_ANSWERS = 60
"""Number of prompts shown with their answers: enough to judge by eye, and the page still opens at once."""
MAX_EVENTS = 200
ROUTINE_EVENTS = frozenset({"checkpoint", "publication"})
"""Kinds of events that come with every step; they are counted and not listed."""
STAGES = ("sft", "reward_model", "ppo")
"""Stages that record metrics."""


@dataclass(frozen=True)
class Answers:
    """One held-out prompt and the answer of each policy."""

    prompt: tuple[Mapping[str, str], ...]
    answers: Mapping[str, str]
    rewards: Mapping[str, float | None]
    utility: Mapping[str, float | None]


@dataclass(frozen=True)
class Content:
    """Everything in a run that the report shows."""

    name: str
    stages: Mapping[str, Table]
    """Metrics by stage (`STAGES`)."""
    reward_quality: Mapping[str, Any] | None
    """Quality of the reward model on held-out labels."""
    evaluation: Mapping[str, Any] | None
    answers: Sequence[Answers]
    event_counts: Mapping[str, int]
    events: tuple[Event, ...]
    """The latest events that are listed one by one."""
    config: str | None
    alerts: tuple[RaisedAlert, ...] = ()
    """All alerts in the order in which they began."""
    problems: tuple[str, ...] = ()
    """What could not be read, as sentences that name file and line."""


class DamagedRun(InputError, ValueError):
    """Files of a run cannot be read. The message has one line for each problem."""


def read_content(folder: RunFolder) -> Content:
    """Read a run's folder. Raises DamagedRun, which names file and line, if a file is damaged."""
    content = RunReader(folder).read()
    if content.problems:
        raise DamagedRun("\n".join(content.problems))
    return content


class RunReader:
    """Reads one run repeatedly. What `read` returns is valid until the next call."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._stages: dict[str, Table] = {}
        self._answers: list[Answers] = []
        self._counts: Counter[str] = Counter()
        self._listed: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._alerts: list[Event] = []
        self._fault_times = array("d")
        self._tails = [
            *(self._stage_tail(stage) for stage in STAGES),
            Tail(folder.evaluation_samples, self._add_answers, self._answers.clear),
            Tail(folder.events, self._add_event, self._clear_events),
        ]

    def fingerprint(self) -> tuple[object, ...]:
        """Unchanged as long as nothing that the report shows has changed."""
        single = (self.folder.config, self.folder.evaluation, self.folder.reward_quality)
        return tuple(fingerprint(path) for path in (*(tail.path for tail in self._tails), *single))

    def read(self) -> Content:
        """The current content of the run."""
        problems: list[str] = []
        for tail in self._tails:
            tail.read_new()
            problems += tail.problems
        quality = _read_json(self.folder.reward_quality, "Train the reward model again to rewrite it", problems)
        evaluation = _read_json(self.folder.evaluation, "Evaluate again to rewrite it", problems)
        return Content(
            name=self.folder.name,
            stages={**self._stages, "ppo": with_fault_counts(self._stages["ppo"], self._fault_times)},
            reward_quality=quality,
            evaluation=evaluation,
            answers=self._answers,
            event_counts=dict(self._counts.most_common()),
            events=tuple(self._listed),
            config=_read_text(self.folder.config),
            alerts=raised_alerts(self._alerts),
            problems=tuple(problems),
        )

    def _stage_tail(self, stage: str) -> Tail:
        def clear() -> None:
            self._stages[stage] = Table()

        clear()
        return Tail(self.folder.stage_metrics(stage), lambda record: self._stages[stage].append(record), clear)

    def _add_answers(self, row: Mapping[str, Any]) -> None:
        if missing := {"prompt", "answers"} - row.keys():
            raise ValueError(f"no {min(missing)!r}; evaluate again to rewrite the file")
        self._answers.append(
            Answers(tuple(row["prompt"]), row["answers"], row.get("rewards") or {}, row.get("utility") or {})
        )

    def _add_event(self, record: Mapping[str, Any]) -> None:
        event = parse_event(record)
        self._counts[event.kind] += 1
        if event.kind == "alert":
            self._alerts.append(event)
        if event.kind == "fault":
            self._fault_times.append(event.time)
        if event.kind not in ROUTINE_EVENTS:
            self._listed.append(event)

    def _clear_events(self) -> None:
        self._counts.clear()
        self._alerts.clear()
        del self._fault_times[:]
        self._listed.clear()


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None


def _read_json(path: Path, remedy: str, problems: list[str]) -> Mapping[str, Any] | None:
    text = _read_text(path)
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError as error:
        problems.append(f"{path}: not JSON ({error}). {remedy}.")
        return None
    if not isinstance(found, Mapping):
        problems.append(f"{path}: a JSON object was expected, not {type(found).__name__}. {remedy}.")
        return None
    return found
