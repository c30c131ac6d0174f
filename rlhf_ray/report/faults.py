"""How many faults a run had had when a step was recorded: the events' times held against those of the records.

An event has no step of its own, as a fault may come while several steps are under way.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlhf_ray.report.table import Table
from rlhf_ray.telemetry.names import FAULTS


def with_faults(table: Table, times: Sequence[float]) -> Table:
    """The table with the figure `names.FAULTS`: of every record that has a time, the faults until then.

    Those after the last record count with it: one that ended the run has no step after it, and is the one that matters.

    Args:
        times: of the faults, in seconds since the epoch.
    """
    stamps = table.timestamps
    rows = np.flatnonzero(np.isfinite(stamps))
    if not len(rows):
        return table
    counts = np.searchsorted(np.sort(times), stamps[rows], side="right")
    counts[-1] = len(times)
    return table.with_figure(FAULTS.name, rows, counts)
