"""Converts the records of a stage to curves: thinned and smoothed, with the extremes that smoothing would hide.

Invariants: a curve has at most `MAX_POINTS` points, however long the run is. Up to `RAW_POINTS` records it consists of the
records themselves; beyond that each point is the mean of a window around it, and `low` and `high` are the extremes of the
window, so that outliers stay visible. Records without the metric, or with null, are left out and counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_ray.report.table import Table
from rlhf_ray.telemetry.names import FAULTS

MAX_POINTS = 240
RAW_POINTS = 80


@dataclass(frozen=True)
class Curve:
    """One metric over the steps. All arrays have the length of `steps`."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    last: float
    """The last recorded value itself, without smoothing."""
    not_finite: int
    """Number of records with null: the value was NaN or infinite, or could not be measured."""


def curve(table: Table, name: str) -> Curve | None:
    """The curve of one metric; None if no record has a value."""
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
    """Window means of several metrics at common steps: steps [M] and means [len(names), M]. Missing values count as 0."""
    values = np.zeros((len(names), len(table)))
    for row, name in zip(values, names, strict=True):
        rows, recorded = table.column(name)
        row[rows] = np.nan_to_num(recorded)
    centres, starts, ends = windows(len(table))
    means = [values[:, start:end].mean(axis=1) for start, end in zip(starts, ends, strict=True)]
    return table.steps[centres].astype(np.float64), np.array(means).T


def windows(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centre, start and end (exclusive) of the window of each point, int [min(count, MAX_POINTS)].

    Together the windows cover all records; the first and last centre are the first and last record.
    """
    half = 0 if count <= RAW_POINTS else max(count // (2 * RAW_POINTS), 1)
    centres = np.linspace(0, count - 1, min(count, MAX_POINTS)).round().astype(int)
    return centres, np.maximum(centres - half, 0), np.minimum(centres + half + 1, count)


def with_fault_counts(table: Table, times: Sequence[float]) -> Table:
    """Add the metric `names.FAULTS`: for each record with a time, the number of faults until then.

    Faults after the last record are counted there: a fault that ended the run has no step after it, and matters most.

    Args:
        times: times of the faults in seconds since the epoch, in any order.
    """
    stamps = table.timestamps
    rows = np.flatnonzero(np.isfinite(stamps))
    if not len(rows):
        return table
    counts = np.searchsorted(np.sort(times), stamps[rows], side="right")
    counts[-1] = len(times)
    return table.with_metric(FAULTS.name, rows, counts)


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers in [low, high], 1, 2 or 5 times a power of ten apart. Requires low < high."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]
