"""From the records of a stage to curves that can be drawn: smoothed, thinned, with the spread that smoothing hides.

Invariants: a curve has at most `MAX_POINTS` points, however long the run; up to `RAW_POINTS` records they are the
records themselves; beyond, each point is the mean of a window around it, and `low` and `high` are that window's
extremes, so that an outlier stays visible. Records without the figure, or with null, are left out and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_ray.report.table import Table

MAX_POINTS = 240
RAW_POINTS = 80


@dataclass(frozen=True)
class Curve:
    """One figure over the steps. All arrays have the length of `steps`."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    last: float
    """The last recorded value itself, not smoothed."""
    not_finite: int
    """Records whose value was null: it had been NaN or infinite, or could not be measured."""


def curve(table: Table, name: str) -> Curve | None:
    """The curve of one figure; None where no record has a value of it."""
    rows, recorded = table.column(name)
    known = np.isfinite(recorded)
    if not known.any():
        return None
    steps, values = table.steps[rows[known]].astype(np.float64), recorded[known]
    centres, starts, ends = windows(len(values))
    return Curve(
        steps=steps[centres],
        mean=np.array([values[start:end].mean() for start, end in zip(starts, ends, strict=True)]),
        low=np.array([values[start:end].min() for start, end in zip(starts, ends, strict=True)]),
        high=np.array([values[start:end].max() for start, end in zip(starts, ends, strict=True)]),
        last=float(values[-1]),
        not_finite=len(recorded) - len(values),
    )


def stacked(table: Table, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Window means of several figures on common steps: steps [M] and means [len(names), M]. A missing value counts as
    0."""
    values = np.zeros((len(names), len(table)))
    for row, name in zip(values, names, strict=True):
        rows, recorded = table.column(name)
        row[rows] = np.nan_to_num(recorded)
    centres, starts, ends = windows(len(table))
    means = [values[:, start:end].mean(axis=1) for start, end in zip(starts, ends, strict=True)]
    return table.steps[centres].astype(np.float64), np.array(means).T


def windows(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centre, start and end (exclusive) of the window behind each point, int [min(count, MAX_POINTS)].

    Together the windows cover all records; the first and the last centre are the first and the last record.
    """
    half = 0 if count <= RAW_POINTS else max(count // (2 * RAW_POINTS), 1)
    centres = np.linspace(0, count - 1, min(count, MAX_POINTS)).round().astype(int)
    return centres, np.maximum(centres - half, 0), np.minimum(centres + half + 1, count)
