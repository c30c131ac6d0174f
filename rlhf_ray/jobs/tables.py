"""Tables of runs for the console."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from rich.table import Table

from rlhf_ray.jobs.cluster import Attempt, Workers
from rlhf_ray.runs.status import RunStatus
from rlhf_ray.telemetry.console import duration
from rlhf_ray.telemetry.names import describe

_STYLES = {"RUNNING": "green", "PENDING": "yellow", "FAILED": "red", "STOPPED": "yellow", "SUCCEEDED": "cyan"}


def status_table(rows: Iterable[tuple[Attempt | None, RunStatus, Workers | None]]) -> Table:
    """A table with one row for each run. Attempt and workers are None for a run that is not a job."""
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for column in ("run", "state", "stage"):
        table.add_column(column)
    for column in ("step", "reward", describe("kl/sequence").label, "loss", "tokens/s"):
        table.add_column(column, justify="right")
    table.add_column("workers")
    table.add_column("alerts", justify="right")
    table.add_column("faults", justify="right")
    for row in rows:
        table.add_row(*status_cells(*row))
    return table


def status_cells(attempt: Attempt | None, status: RunStatus, workers: Workers | None) -> tuple[str, ...]:
    """The cells of one row, as rich markup."""
    alerts, faults = (f"[red]{count}[/]" if count else "0" for count in (status.alerts, status.faults))
    return (
        status.run, _state(attempt), (status.stage or "–").replace("_", " "), _step(status), _figure(status.reward),
        _figure(status.kl), _figure(status.loss), "–" if status.throughput is None else f"{status.throughput:,.0f}",
        _workers(workers), alerts, faults,
    )  # fmt: skip


def run_table(attempts: Sequence[Attempt], now: float | None = None) -> Table:
    """A table with the last attempt of each run. `now` is in seconds since the epoch."""
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for column in ("run", "state", "attempts", "began", "took"):
        table.add_column(column, justify="right" if column in ("attempts", "took") else "left")
    table.add_column("folder", overflow="fold")
    newest = {attempt.submission.run: attempt for attempt in attempts}
    for run, attempt in newest.items():
        number = sum(other.submission.run == run for other in attempts)
        table.add_row(
            run, _state(attempt), str(number), *_times(attempt, now or time.time()), attempt.submission.folder
        )
    return table


def _times(attempt: Attempt, now: float) -> tuple[str, str]:
    if attempt.started is None:
        return "–", "–"
    began = time.strftime("%Y-%m-%d %H:%M", time.localtime(attempt.started))
    return began, duration((attempt.ended or now) - attempt.started)


def _state(attempt: Attempt | None) -> str:
    return "–" if attempt is None else f"[{_STYLES.get(attempt.state, 'white')}]{attempt.state.lower()}[/]"


def _step(status: RunStatus) -> str:
    if status.step is None:
        return "–"
    return f"{status.step}/{status.steps}" if status.steps else str(status.step)


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _workers(workers: Workers | None) -> str:
    if workers is None or not workers.by_role:
        return "–"
    roles = ", ".join(f"{count} {role}" for role, count in sorted(workers.by_role.items()))
    return f"{roles} on {workers.nodes} node{'s' if workers.nodes > 1 else ''}"
