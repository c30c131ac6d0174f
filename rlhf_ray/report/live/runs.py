"""Which runs there are to watch, and where each stands.

Invariants: a run is found only by a name of the listing, so no request can name a path; a run that a link leads out of
the watched folder, itself or one of its files, is not listed; one whose files are damaged has a row that says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlhf_ray.runs.run_folder import QUALITY, RunFolder
from rlhf_ray.runs.status import RunStatus, read_status
from rlhf_ray.runs.tail import fingerprint


@dataclass(frozen=True)
class Row:
    """A run in the list."""

    name: str
    changed: float | None
    """Seconds since the epoch; None where it has written nothing yet."""
    status: RunStatus
    problem: str = ""
    """Why the status is not known."""

    @property
    def progress(self) -> float | None:
        """Share of the steps that are done, in per cent; None where their number is not known."""
        step, steps = self.status.step, self.status.steps
        return None if step is None or not steps else min(100.0, 100.0 * step / steps)


class Runs:
    """A folder with runs, or one run."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser().resolve()
        self._rows: dict[str, tuple[object, Row]] = {}

    def found(self) -> dict[str, RunFolder]:
        """By name, in the order of their names."""
        folders = map(RunFolder, self._places())
        return {folder.name: folder for folder in folders if folder.holds_run and self._holds(folder)}

    def find(self, name: str) -> RunFolder | None:
        """The run of this name; None where there is none."""
        folder = next((RunFolder(path) for path in self._places() if path.name == name), None)
        return folder if folder is not None and folder.holds_run and self._holds(folder) else None

    def _places(self) -> list[Path]:
        if RunFolder(self.root).holds_run:
            return [self.root]
        return sorted(path for path in self.root.iterdir() if path.is_dir()) if self.root.is_dir() else []

    def _holds(self, folder: RunFolder) -> bool:
        shown = [folder.evaluation, folder.evaluation_samples, folder.reward_ensemble, folder.reward_model / QUALITY]
        files = [*_files(folder), *shown]
        links = (path for path in {folder.path, *files, *(file.parent for file in files)} if path.is_symlink())
        return all(link.resolve().is_relative_to(self.root) for link in links)

    def fingerprint(self) -> tuple[object, ...]:
        """Equal as long as the list is."""
        return tuple((name, _marks(folder)) for name, folder in self.found().items())

    def rows(self) -> list[Row]:
        """All runs, the one that changed last first. Only those that changed are read again."""
        found = self.found()
        self._rows = {name: self._rows[name] for name in self._rows.keys() & found.keys()}
        for name, folder in found.items():
            marks = _marks(folder)
            if name not in self._rows or self._rows[name][0] != marks:
                self._rows[name] = (marks, _row(folder))
        return sorted((row for _, row in self._rows.values()), key=lambda row: (-(row.changed or 0.0), row.name))


def _marks(folder: RunFolder) -> tuple[object, ...]:
    return tuple((str(path), fingerprint(path)) for path in _files(folder))


def _files(folder: RunFolder) -> list[Path]:
    return [folder.config, folder.events, folder.metrics, *sorted(folder.path.glob("*/metrics.jsonl"))]


def _row(folder: RunFolder) -> Row:
    known = [found for path in _files(folder) if (found := fingerprint(path)) is not None]
    changed = max((mtime_ns / 1e9 for _, _, mtime_ns in known), default=None)
    try:
        return Row(folder.name, changed, read_status(folder))
    except (ValueError, OSError) as error:
        # Other programs write these files: whatever is in them, the list says so and shows the other runs.
        return Row(folder.name, changed, RunStatus(folder.name), str(error))
