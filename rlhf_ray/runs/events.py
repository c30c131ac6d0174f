"""events.jsonl: what happened in a run besides its steps: faults, drops with reasons, checkpoints, worker changes.

Invariant: events are only ever appended. A resume that repeats steps keeps the earlier events, because they did happen.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf_ray.runs.jsonl import Closeable, JsonLines, damaged_line, read_jsonl
from rlhf_ray.telemetry.prometheus import EventCounter

EventKind = Literal[
    "stage", "checkpoint", "publication", "release", "join", "departure", "fault", "drop", "warning", "alert"
]  # fmt: skip
"""stage: a stage began or ended. publication: the rollout workers received new weights. release: an endpoint received a version
of the policy. join, departure: a worker came or went. fault: something failed and was handled. drop: data was left out, with the
reason. warning: a person should look at it. alert: a training metric became abnormal, or is normal again."""


@dataclass(frozen=True)
class Event:
    """One line of events.jsonl."""

    time: float
    """Seconds since the epoch."""
    kind: str
    message: str
    """A sentence for people."""
    fields: dict[str, Any]
    """The same information for programs (step, worker, reason, count, …) as JSON values."""


_TYPES: dict[str, tuple[type | tuple[type, ...], str]] = {
    "time": ((int, float), "a number"),
    "kind": (str, "a string"),
    "message": (str, "a string"),
    "fields": (dict, "an object"),
}
_ALERT_FIELDS = ("alert", "change", "step")
"""Fields that every alert event must have."""


class EventLog(Closeable):
    """Writes a run's events.jsonl and counts events for Prometheus under the name of the folder. Only the driver has one."""

    def __init__(self, path: str | Path) -> None:
        self._lines = JsonLines(path, keep_until_step=None)
        self._counter = EventCounter(Path(path).absolute().parent.name)

    def emit(self, kind: EventKind, message: str, **fields: Any) -> None:
        """Append one event. Raises TypeError or ValueError if a field is not a JSON value; NaN is not."""
        self._lines.append({"time": round(time.time(), 3), "kind": kind, "message": message, "fields": fields})
        self._counter.count(kind)

    def close(self) -> None:
        """Sync to disk and close."""
        self._lines.close()


def read_events(path: str | Path) -> list[Event]:
    """Read all events in the order in which they happened; a missing file has none.

    Raises DamagedLine, which names file and line, if a complete line is not an event.
    """
    events = []
    for number, record in enumerate(read_jsonl(path), start=1):
        try:
            events.append(parse_event(record))
        except ValueError as error:
            raise damaged_line(Path(path), number, str(error)) from error
    return events


def parse_event(record: Mapping[str, Any]) -> Event:
    """Convert a record of events.jsonl. Raises ValueError, which says what is missing or wrong, if it is not an event."""
    for name, (types, expected) in _TYPES.items():
        if name not in record:
            raise ValueError(f"no {name!r}, which every event has. Restore or remove the line.")
        if not isinstance(record[name], types):
            raise ValueError(f"{name} is {record[name]!r}; {expected} is expected. Restore or remove the line.")
    event = Event(record["time"], record["kind"], record["message"], record["fields"])
    if event.kind == "alert" and (missing := [name for name in _ALERT_FIELDS if name not in event.fields]):
        raise ValueError(f"no {missing[0]!r} in its fields, which every alert has. Restore or remove the line.")
    return event
