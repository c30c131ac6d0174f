"""Curves keep what matters when they are thinned; axes have round numbers; figures read well."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_ray.report.curves import MAX_POINTS, curve, stacked, ticks, windows, with_fault_counts
from rlhf_ray.report.table import Table
from rlhf_ray.telemetry.console import compact, duration, figure
from rlhf_ray.telemetry.names import FAULTS


def table_of(records):
    table = Table()
    for record in records:
        table.append(record)
    return table


def records(values):
    return table_of({"step": step, "x": value} for step, value in enumerate(values, start=1))


def test_short_curve_is_the_records_themselves():
    drawn = curve(records([3.0, 1.0, 2.0]), "x")
    np.testing.assert_array_equal(drawn.steps, [1, 2, 3])
    for line in (drawn.mean, drawn.low, drawn.high):
        np.testing.assert_array_equal(line, [3.0, 1.0, 2.0])


@pytest.mark.parametrize("count", [1, 2, 80, 81, 161, 239, 240, 241, 1000, 9999])
def test_windows_cover_every_record_and_lie_within(count):
    centres, starts, ends = windows(count)
    assert len(centres) == min(count, MAX_POINTS)
    assert (centres[0], centres[-1]) == (0, count - 1)
    assert (starts >= 0).all() and (ends <= count).all() and (starts <= centres).all() and (centres < ends).all()
    assert (starts[1:] <= ends[:-1]).all()


def test_single_outlier_stays_visible_in_a_long_run():
    values = np.zeros(10_000)
    values[6_123] = 9.0
    drawn = curve(records(values.tolist()), "x")
    assert drawn.high.max() == 9.0
    assert drawn.mean.max() < 1.0


def test_smoothing_of_a_straight_line_is_the_line():
    drawn = curve(records([2.0 * step for step in range(1, 1001)]), "x")
    inner = slice(10, -10)
    np.testing.assert_allclose(drawn.mean[inner], 2.0 * drawn.steps[inner])


def test_missing_phase_counts_as_nothing_in_the_stack():
    steps, layers = stacked(table_of([{"step": 1, "a": 1.0}, {"step": 2, "a": 2.0, "b": 5.0}]), ["a", "b"])
    np.testing.assert_array_equal(steps, [1, 2])
    np.testing.assert_array_equal(layers, [[1.0, 2.0], [0.0, 5.0]])


@pytest.mark.parametrize(
    ("times", "counts"),
    [
        ([], [0, 0, 0, 0]),
        ([5.0, 25.0, 25.0, 30.0], [1, 1, 4, 4]),
        ([25.0, 5.0], [1, 1, 2, 2]),
        ([100.0], [0, 0, 0, 1]),
    ],
    ids=["none", "several before a step", "in whatever order they stand", "after the last step"],
)
def test_faults_are_counted_until_the_step_was_recorded(times, counts):
    table = table_of({"step": step, "timestamp": 10.0 * step, "x": 1.0} for step in (1, 2, 3, 4))
    drawn = curve(with_fault_counts(table, times), FAULTS.name)
    np.testing.assert_array_equal(drawn.steps, [1, 2, 3, 4])
    np.testing.assert_array_equal(drawn.mean, counts)
    assert drawn.last == len(times) and drawn.not_finite == 0


def test_faults_are_drawn_only_where_the_time_of_a_step_is_known():
    times = [5.0, 15.0]
    table = table_of([{"step": 1}, {"step": 2, "timestamp": 10.0}, {"step": 3, "timestamp": None}])
    np.testing.assert_array_equal(curve(with_fault_counts(table, times), FAULTS.name).steps, [2])
    assert curve(with_fault_counts(table_of([{"step": 1}]), times), FAULTS.name) is None
    assert curve(with_fault_counts(Table(), times), FAULTS.name) is None


def test_counting_faults_changes_neither_the_table_nor_what_it_takes_later():
    table = table_of([{"step": 1, "timestamp": 10.0, "x": 1.0}])
    counted = with_fault_counts(table, [5.0])
    table.append({"step": 2, "timestamp": 20.0, "x": 3.0, "y": 2.0})
    assert table.names == ("x", "y") and table.ended == 20.0
    assert counted.names == ("x", FAULTS.name) and counted.ended == 10.0
    np.testing.assert_array_equal(curve(with_fault_counts(table, [5.0, 15.0]), FAULTS.name).mean, [1, 2])


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.7, 12.2), (1e-7, 3.1e-6), (99_990, 100_010), (0.05, 0.0501)])
def test_ticks_are_round_few_and_within(low, high):
    marks = ticks(low, high)
    assert 2 <= len(marks) <= 6
    assert min(marks) >= low - 1e-9 * (high - low) and max(marks) <= high + 1e-9 * (high - low)
    gap = (marks[1] - marks[0]) / 10.0 ** np.floor(np.log10(marks[1] - marks[0]) + 1e-6)
    assert any(gap == pytest.approx(nice, rel=1e-3) for nice in (1, 2, 5))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1.2345, "1.23"), (-0.5, "−0.5"), (2e-7, "2e−7"), (-2.34e-6, "−2.34e−6"), (999.4, "999"),
     (1234.5, "1234"), (52_345, "52.34k"), (3.2e6, "3.2M"), (1e15, "1e15")],
)  # fmt: skip
def test_compact_figures(value, text):
    assert compact(value) == text


def test_figures_with_units():
    assert figure(0.9123, "%") == "91.2\u202f%"
    assert figure(6.8, "nats") == "6.8\xa0nats"
    assert figure(None, "nats") == "—"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.2, "4.2s"), (61, "1m01s"), (205, "3m25s"), (7500, "2h05m"), (3599.7, "1h00m")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
