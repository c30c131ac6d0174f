"""metrics.jsonl: one record per step of a stage, also written to TensorBoard and exported as Ray gauges.

Invariants: steps increase from record to record, so a step is recorded at most once; a log that resumes at step N holds the steps
up to N only; a value that is not finite is recorded as null, never as a number or as invalid JSON.
"""

from __future__ import annotations

import numbers
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from rlhf_ray.runs.jsonl import Closeable, JsonLines, finite_or_none, read_jsonl
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.telemetry.prometheus import StepGauges


class MetricsLog(Closeable):
    """Records the metrics of a stage. Names are those of the catalogue (`rlhf_ray.telemetry.names`)."""

    def __init__(self, folder: RunFolder, stage: str = "ppo", resume_step: int | None = None) -> None:
        """Open the log of a stage.

        Args:
            resume_step: continue after this step; later records, which a crash left behind, are removed, also from TensorBoard.
                None starts an empty log.
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
        """Record the metrics of one step; None and values that are not finite become null. Returns the record.

        Raises:
            ValueError: the step is not larger than the last one, or a metric is named `step` or `timestamp`.
            TypeError: a value is not a number; the message names the metric.
        """
        if step <= self._last_step:
            raise ValueError(
                f"{self._lines.path}: step {step} comes after step {self._last_step}; steps are recorded once and in order. "
                "To continue from an earlier state, open the log with resume_step."
            )
        if reserved := {"step", "timestamp"} & metrics.keys():
            raise ValueError(
                f"{min(reserved)!r} cannot be the name of a metric: every record has its own field of that name."
            )
        values = {name: _number(name, value) for name, value in metrics.items()}
        record = {"step": step, "timestamp": round(time.time(), 3), **values}
        self._lines.append(record)
        self._last_step = step
        for name, value in values.items():
            if value is not None:
                self._tensorboard.add_scalar(name, value, step)
        self._gauges.set(values)
        return record

    def sync(self) -> None:
        """Wait until all records are on disk. Call it before a checkpoint is complete, so that no checkpoint has a lost step."""
        self._lines.sync()
        self._tensorboard.flush()

    def close(self) -> None:
        """Sync to disk and close."""
        self._lines.close()
        self._tensorboard.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read the records of a metrics file in the order of their steps; a missing file has none. A torn last line is skipped."""
    return list(read_jsonl(path))


def _number(name: str, value: Any) -> float | int | None:
    if value is None:
        return None
    if isinstance(value, numbers.Integral):
        return int(value)
    if not isinstance(value, numbers.Real) and not (hasattr(value, "item") and getattr(value, "ndim", None) == 0):
        raise TypeError(f"Metric {name!r} is {value!r} ({type(value).__name__}); a number or None is allowed.")
    return finite_or_none(float(value))
