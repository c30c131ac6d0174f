"""What happened in a run beside its steps: faults, drops with their reasons, checkpoints, publications, joins,
departures.

Invariant: events are only ever appended, also on resume, where steps may come again: what happened did happen.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf_ray.runs.jsonl import Closing, JsonLines, damaged, read_jsonl
from rlhf_ray.telemetry.prometheus import EventCounter

EventKind = Literal[
    "stage", "checkpoint", "publication", "release", "join", "departure", "fault", "drop", "warning", "alert"
]  # fmt: skip
"""stage: one began or ended; publication: new weights reached the rollout workers; release: a version of the policy reached
an endpoint; join, departure: a worker; fault: something failed and was dealt with; drop: data was left out, with the reason;
warning: a person should look; alert: a figure of the training is not as it should be, or is so again."""


@dataclass(frozen=True)
class Event:
    """One line of events.jsonl."""

    time: float
    """Seconds since the epoch."""
    kind: str
    message: str
    """A sentence for a person."""
    fields: dict[str, Any]
    """The same for programs: step, worker, reason, count, …; JSON values."""


_TYPES: dict[str, tuple[type | tuple[type, ...], str]] = {
    "time": ((int, float), "a number"),
    "kind": (str, "a text"),
    "message": (str, "a text"),
    "fields": (dict, "an object"),
}
_ALERT_FIELDS = ("alert", "change", "step")
"""Without them an alert is about nothing."""


class EventLog(Closing):
    """The run's events.jsonl, written by the driver alone; counted for Prometheus under the name of its folder."""

    def __init__(self, path: str | Path) -> None:
        self._lines = JsonLines(path, keep_until_step=None)
        self._counter = EventCounter(Path(path).absolute().parent.name)

    def emit(self, kind: EventKind, message: str, **fields: Any) -> None:
        """Append one event. Fields are JSON values; raises TypeError or ValueError where one is not, NaN included."""
        self._lines.append({"time": round(time.time(), 3), "kind": kind, "message": message, "fields": fields})
        self._counter.count(kind)

    def close(self) -> None:
        """Sync and close."""
        self._lines.close()


def read_events(path: str | Path) -> list[Event]:
    """All events in the order in which they happened; empty where there is no file.

    Raises DamagedLine naming file and line where a whole line is no event.
    """
    events = []
    for number, record in enumerate(read_jsonl(path), start=1):
        try:
            events.append(event_of(record))
        except ValueError as error:
            raise damaged(Path(path), number, str(error)) from error
    return events


def event_of(record: Mapping[str, Any]) -> Event:
    """The event that a record of events.jsonl is. Raises ValueError, saying what it lacks, where it is none."""
    for name, (types, said) in _TYPES.items():
        if name not in record:
            raise ValueError(f"no {name!r}, which every event has. Restore or remove the line.")
        if not isinstance(record[name], types):
            raise ValueError(f"{name} is {record[name]!r}; {said} is expected. Restore or remove the line.")
    event = Event(record["time"], record["kind"], record["message"], record["fields"])
    if event.kind == "alert" and (missing := [name for name in _ALERT_FIELDS if name not in event.fields]):
        raise ValueError(f"no {missing[0]!r} in its fields, which every alert has. Restore or remove the line.")
    return event
