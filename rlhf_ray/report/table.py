"""The metrics of a stage by column, as charts read them; 16 bytes per value.

Invariants: rows keep the order in which they were recorded; a column has no row for a record without the metric, and NaN for a
record in which it is null; a record that is rejected changes nothing.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np

_NOT_METRICS = ("step", "timestamp")
"""Fields of a record that are not metrics."""
_STEP_LIMIT = 2**53


class Table:
    """Grows by `append`. `column` returns copies, which do not change."""

    def __init__(self) -> None:
        self._steps = array("q")
        self._rows: dict[str, array[int]] = {}
        self._values: dict[str, array[float]] = {}
        self._timestamps = array("d")
        self.began: float | None = None
        """Time of the first record in seconds since the epoch; None if unknown."""
        self.ended: float | None = None
        """Time of the last record in seconds since the epoch; None if unknown."""

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record of metrics.jsonl.

        Raises:
            ValueError: a value is neither a number nor null, or the step is missing or invalid.
        """
        step = record.get("step")
        if type(step) is not int or not 0 <= step < _STEP_LIMIT:
            raise ValueError(f"step is {step!r}; a whole number from 0 is expected")
        if wrong := next((name for name, value in record.items() if not isinstance(value, int | float | None)), None):
            raise ValueError(f"{wrong} is {record[wrong]!r}; a number or null is expected")
        for name, value in record.items():
            if name not in _NOT_METRICS:
                self._rows.setdefault(name, array("q")).append(len(self._steps))
                self._values.setdefault(name, array("d")).append(math.nan if value is None else value)
        self._steps.append(step)
        self.ended = record.get("timestamp")
        self._timestamps.append(math.nan if self.ended is None else self.ended)
        self.began = self.ended if len(self._steps) == 1 else self.began

    def with_metric(self, name: str, rows: np.ndarray, values: np.ndarray) -> Table:
        """A table of the same records with one more metric. Records are shared, not copied: if this table grows, the new one
        does not follow.

        Args:
            rows: int [N], ascending numbers of the records that have the metric.
            values: [N], finite.
        """
        table = Table()
        table._steps, table._timestamps = self._steps, self._timestamps
        table.began, table.ended = self.began, self.ended
        table._rows = self._rows | {name: array("q", rows.astype(np.int64).tobytes())}
        table._values = self._values | {name: array("d", values.astype(np.float64).tobytes())}
        return table

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def last_step(self) -> int | None:
        """The last recorded step; None if the table is empty."""
        return self._steps[-1] if self._steps else None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all metrics, in the order in which they first appeared."""
        return tuple(self._rows)

    @property
    def steps(self) -> np.ndarray:
        """int64 [len(self)]."""
        return np.array(self._steps)

    @property
    def timestamps(self) -> np.ndarray:
        """float64 [len(self)], seconds since the epoch; NaN for records without a time."""
        return np.array(self._timestamps)

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers int64 [N] and values float64 [N] of the records that have the metric; N may be 0."""
        if name not in self._rows:
            return np.empty(0, dtype=np.int64), np.empty(0)
        return np.array(self._rows[name]), np.array(self._values[name])

    def last(self, name: str) -> float | None:
        """The value in the last record; None if that is missing or null."""
        rows, values = self.column(name)
        return float(values[-1]) if len(rows) and rows[-1] == len(self) - 1 and math.isfinite(values[-1]) else None
