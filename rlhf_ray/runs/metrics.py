"""The metrics of a stage: one JSON object per step, the same figures in TensorBoard and as Ray gauges.

Invariants: steps increase from record to record, so a step is recorded at most once; a log that resumes at step N
holds the steps up to N and no other; a figure that is not finite is recorded as null, never as invalid JSON and never
as a number.
"""

from __future__ import annotations

import numbers
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from rlhf_ray.runs.jsonl import Closing, JsonLines, finite_or_none, read_jsonl
from rlhf_ray.telemetry.prometheus import StepGauges
from rlhf_ray.runs.run_folder import RunFolder


class MetricsLog(Closing):
    """Where a stage records its figures. Names are the catalogue's (`rlhf_ray.telemetry.names`)."""

    def __init__(self, folder: RunFolder, stage: str = "ppo", resume_step: int | None = None) -> None:
        """Open the stage's log.

        `resume_step=None` starts an empty log. N continues from the state after step N: later records, which a crash
        left behind, are dropped, and TensorBoard is told to forget them.
        """
        path = folder.stage_metrics(stage)
        if resume_step is None:
            path.unlink(missing_ok=True)
        self._lines = JsonLines(path, keep_until_step=resume_step)
        self._last_step = -1 if self._lines.last is None else int(self._lines.last["step"])
        self._tensorboard = SummaryWriter(
            str(folder.tensorboard / stage), purge_step=0 if resume_step is None else resume_step + 1
        )
        self._gauges = StepGauges(folder.name, stage)

    def log(self, step: int, metrics: Mapping[str, float | int | None]) -> dict[str, float | int | None]:
        """Record the figures of one step; None and figures that are not finite become null. Returns the record.

        Raises ValueError where the step is not above the last one, or a name is `step` or `timestamp`, which the record
        uses itself; TypeError, naming the metric, where a value is no number.
        """
        if step <= self._last_step:
            raise ValueError(
                f"{self._lines.path}: step {step} comes after step {self._last_step}; a step is recorded once, "
                f"in order. To continue from an earlier state, open the log with resume_step."
            )
        if reserved := {"step", "timestamp"} & metrics.keys():
            raise ValueError(f"{min(reserved)!r} is not a metric's name: every record has that field of its own.")
        figures = {name: _number(name, value) for name, value in metrics.items()}
        record = {"step": step, "timestamp": round(time.time(), 3), **figures}
        self._lines.append(record)
        self._last_step = step
        for name, value in figures.items():
            if value is not None:
                self._tensorboard.add_scalar(name, value, step)
        self._gauges.set(figures)
        return record

    def sync(self) -> None:
        """Wait until every record is on the disk: before a checkpoint is declared whole, so that it knows no lost
        step."""
        self._lines.sync()
        self._tensorboard.flush()

    def close(self) -> None:
        """Sync and close."""
        self._lines.close()
        self._tensorboard.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics file in the order of their steps; empty where there is no file. A torn last line is
    skipped."""
    return list(read_jsonl(path))


def _number(name: str, value: Any) -> float | int | None:
    if value is None:
        return None
    if isinstance(value, numbers.Integral):
        return int(value)
    if not isinstance(value, numbers.Real) and not (hasattr(value, "item") and getattr(value, "ndim", None) == 0):
        raise TypeError(f"Metric {name!r} is {value!r} ({type(value).__name__}); a number or None is allowed.")
    return finite_or_none(float(value))
