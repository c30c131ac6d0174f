"""The progress display of a stage: steps done, time left, the main metrics and the time per phase.

Invariants: on a terminal the display stays below everything else that is printed, because it takes over `sys.stdout` and
`sys.stderr` (Ray's log lines use them too). Without a terminal it is one plain line every few steps, so that logs stay readable.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from rlhf_ray.telemetry.console import console as shared_console
from rlhf_ray.telemetry.console import duration
from rlhf_ray.telemetry.names import describe

KEY_METRICS = (
    "reward/mean",
    "kl/sequence",
    "response/length_mean",
    "policy/entropy",
    "throughput/samples_per_s",
    "loss",
    "heldout/loss",
    "heldout/accuracy",
    "throughput/tokens_per_s",
)
"""Metrics that are shown, if the stage has them."""

_COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")
_SPARKS = "▁▂▃▄▅▆▇█"
_HISTORY = 12


class StageProgress:
    """Shows the progress of one stage. A context manager."""

    def __init__(
        self,
        run: str,
        stage: str,
        total: int,
        completed: int = 0,
        plain_every: int = 10,
        console: Console = shared_console,
    ) -> None:
        """`total` and `completed` are numbers of steps. Without a terminal every `plain_every`-th step is printed."""
        self._console, self._run, self._stage = console, run, stage.replace("_", " ")
        self._total, self._plain_every = total, plain_every
        self._first_step = self._step = completed
        self._metrics: dict[str, float | None] = {}
        self._history: dict[str, deque[float]] = {}
        self._began = time.perf_counter()
        self._live: Live | None = None
        self._bar = Progress(
            BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
            MofNCompleteColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
        )
        self._task = self._bar.add_task(self._stage, total=total, completed=completed)

    def __enter__(self) -> Self:
        self._began = time.perf_counter()
        if self._console.is_terminal:
            self._live = Live(get_renderable=self._display, console=self._console, transient=True, refresh_per_second=4)
            self._live.start()
        else:
            resumed = f", {self._step} done before" if self._step else ""
            self._plain(f"{self._total} steps{resumed}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        mark, style = ("✓", "green") if kind is None else ("✗", "red")
        steps = f"{self._step}/{self._total} steps in {duration(time.perf_counter() - self._began)}"
        figures = "  ".join(self._key_metrics())
        line = f"[{style}]{mark}[/] [bold]{escape(self._stage)}[/]  {steps}  [dim]{escape(figures)}[/]"
        self._console.print(line, highlight=False, soft_wrap=True)

    @property
    def step(self) -> int:
        """Number of steps done."""
        return self._step

    def update(self, step: int, metrics: Mapping[str, float | None] | None = None) -> None:
        """Show that `step` steps are done, with the metrics of the last one."""
        self._step = step
        self._metrics.update(metrics or {})
        for name in KEY_METRICS:
            if metrics and (value := metrics.get(name)) is not None:
                self._history.setdefault(name, deque(maxlen=_HISTORY)).append(value)
        self._bar.update(self._task, completed=step)
        if self._live is None and (step % self._plain_every == 0 or step == self._total):
            self._plain("  ".join([f"{step}/{self._total}", *self._key_metrics(), *self._time_left()]))

    def note(self, message: str) -> None:
        """Print a line above the display."""
        self._console.print(escape(message), highlight=False, soft_wrap=True)

    def _plain(self, line: str) -> None:
        self._console.print(f"{self._run} · {self._stage} · {line}", markup=False, highlight=False, soft_wrap=True)
        self._console.file.flush()

    def _key_metrics(self) -> list[str]:
        known = ((name, self._metrics.get(name)) for name in KEY_METRICS)
        return [f"{describe(name).label} {_format(name, value)}" for name, value in known if value is not None]

    def _time_left(self) -> list[str]:
        done = self._step - self._first_step
        if done <= 0 or self._step >= self._total:
            return []
        per_step = (time.perf_counter() - self._began) / done
        return [f"{duration(per_step * (self._total - self._step))} left"]

    def _display(self) -> RenderableType:
        header = Text.assemble((f" {self._run} ", "bold black on cyan"), " ", (self._stage, "bold"))
        parts: list[RenderableType] = [header, self._bar]
        if self._history:
            parts.append(self._metrics_table())
        if phases := self._phase_line():
            parts.append(phases)
        return Padding(Group(*parts), (1, 0, 0, 0))

    def _metrics_table(self) -> RenderableType:
        table = Table.grid(padding=(0, 3))
        names = list(self._history)
        table.add_row(*(Text(describe(name).label, "dim") for name in names))
        table.add_row(*(Text(_format(name, self._history[name][-1]), "bold") for name in names))
        table.add_row(*(Text(_sparkline(self._history[name]), "cyan") for name in names))
        return table

    def _phase_line(self) -> Text | None:
        """The time of a step as a line: each phase with its seconds, the longest first."""
        phases = {
            describe(name).label: value
            for name, value in self._metrics.items()
            if name.startswith("time/") and name != "time/step_s" and value
        }
        if not phases:
            return None
        line = Text("step ", "dim")
        line.append(f"{self._metrics.get('time/step_s') or sum(phases.values()):.2f} s  ", "bold")
        for index, (phase, seconds) in enumerate(sorted(phases.items(), key=lambda item: -item[1])):
            line.append("■ ", _COLOURS[index % len(_COLOURS)])
            line.append(f"{phase} {seconds:.2f}  ")
        return line


def _sparkline(values: deque[float]) -> str:
    low, high = min(values), max(values)
    scale = (len(_SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_SPARKS[round((value - low) * scale)] for value in values)


def _format(name: str, value: float) -> str:
    return f"{value:.1%}" if describe(name).unit == "%" else f"{value:.4g}"
