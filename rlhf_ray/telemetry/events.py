"""What happened in a run beside its steps: faults, drops with their reasons, checkpoints, publications, joins,
departures.

Invariant: events are only ever appended, also on resume, where steps may come again: what happened did happen.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf_ray.telemetry.jsonl import Closing, JsonLines, read_jsonl
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
    """All events in the order in which they happened; empty where there is no file."""
    return [Event(record["time"], record["kind"], record["message"], record["fields"]) for record in read_jsonl(path)]
