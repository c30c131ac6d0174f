"""A stage's metrics by column: what charts read, 16 bytes for each figure of each step.

Invariants: rows keep the order in which they were recorded; a figure that a record has not is no row of its column, and
one that was null is not-a-number there; a record that is refused changes nothing.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping
from typing import Any, Self

import numpy as np

_OWN = ("step", "timestamp")
"""Fields of a record that are no figures."""
_MANY = 2**53


class Table:
    """Grows by `append`; what `column` returns is a copy and stays as it is."""

    def __init__(self) -> None:
        self._steps = array("q")
        self._rows: dict[str, array[int]] = {}
        self._values: dict[str, array[float]] = {}
        self._timestamps = array("d")
        self.began: float | None = None
        self.ended: float | None = None
        """Seconds since the epoch of the first and of the last record; None where there is none."""

    @classmethod
    def of(cls, records: Iterable[Mapping[str, Any]]) -> Self:
        """A table of these records."""
        table = cls()
        for record in records:
            table.append(record)
        return table

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record of metrics.jsonl.

        Raises:
            ValueError: a figure is neither a number nor null, or there is no step.
        """
        step = record.get("step")
        if type(step) is not int or not 0 <= step < _MANY:
            raise ValueError(f"a record's step is a whole number from 0, not {step!r}")
        if wrong := next((name for name, value in record.items() if not isinstance(value, int | float | None)), None):
            raise ValueError(f"{wrong} is {record[wrong]!r}; a number or null is expected")
        for name, value in record.items():
            if name not in _OWN:
                self._rows.setdefault(name, array("q")).append(len(self._steps))
                self._values.setdefault(name, array("d")).append(math.nan if value is None else value)
        self._steps.append(step)
        self.ended = record.get("timestamp")
        self._timestamps.append(math.nan if self.ended is None else self.ended)
        self.began = self.ended if len(self._steps) == 1 else self.began

    def with_figure(self, name: str, rows: np.ndarray, values: np.ndarray) -> Table:
        """These records with one more figure, instead of their own of that name. What they have is shared, not copied: this
        table may grow, and the new one is what it was then.

        Args:
            rows: int [N], of the records that have the figure, ascending.
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
        """None where nothing was recorded."""
        return self._steps[-1] if self._steps else None

    @property
    def names(self) -> tuple[str, ...]:
        """Of all figures, in the order of their appearance."""
        return tuple(self._rows)

    @property
    def steps(self) -> np.ndarray:
        """int64 [len(self)]."""
        return np.array(self._steps)

    @property
    def timestamps(self) -> np.ndarray:
        """float64 [len(self)], seconds since the epoch; not-a-number where a record has none."""
        return np.array(self._timestamps)

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers int64 [N] and values float64 [N] of the records that have the figure; N is 0 where none has."""
        if name not in self._rows:
            return np.empty(0, dtype=np.int64), np.empty(0)
        return np.array(self._rows[name]), np.array(self._values[name])

    def last(self, name: str) -> float | None:
        """The figure in the last record; None where it has none, or null."""
        rows, values = self.column(name)
        return float(values[-1]) if len(rows) and rows[-1] == len(self) - 1 and math.isfinite(values[-1]) else None
