"""Lists the runs to watch and their status.

Invariants: runs are found only by a name in the listing, so no request can name a path; a run is not listed if a link, itself
or one of its files, leads out of the watched folder; a run whose files are damaged has a row that says so.
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
    """Time of the last change in seconds since the epoch; None if the run has written nothing yet."""
    status: RunStatus
    problem: str = ""
    """Why the status is unknown."""

    @property
    def progress(self) -> float | None:
        """Steps done in per cent; None if the total is unknown."""
        step, steps = self.status.step, self.status.steps
        return None if step is None or not steps else min(100.0, 100.0 * step / steps)


class Runs:
    """The runs in a folder, or a single run."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser().resolve()
        self._rows: dict[str, tuple[object, Row]] = {}

    def found(self) -> dict[str, RunFolder]:
        """All runs by name, sorted by name."""
        folders = map(RunFolder, self._candidates())
        return {folder.name: folder for folder in folders if folder.holds_run and self._is_inside(folder)}

    def find(self, name: str) -> RunFolder | None:
        """The run of this name; None if there is none."""
        folder = next((RunFolder(path) for path in self._candidates() if path.name == name), None)
        return folder if folder is not None and folder.holds_run and self._is_inside(folder) else None

    def fingerprint(self) -> tuple[object, ...]:
        """Unchanged as long as the list is."""
        return tuple((name, _fingerprints(folder)) for name, folder in self.found().items())

    def rows(self) -> list[Row]:
        """All runs, sorted by their last change, newest first. Only runs that changed are read again."""
        found = self.found()
        self._rows = {name: self._rows[name] for name in self._rows.keys() & found.keys()}
        for name, folder in found.items():
            fingerprints = _fingerprints(folder)
            if name not in self._rows or self._rows[name][0] != fingerprints:
                self._rows[name] = (fingerprints, _row(folder))
        return sorted((row for _, row in self._rows.values()), key=lambda row: (-(row.changed or 0.0), row.name))

    def _candidates(self) -> list[Path]:
        if RunFolder(self.root).holds_run:
            return [self.root]
        return sorted(path for path in self.root.iterdir() if path.is_dir()) if self.root.is_dir() else []

    def _is_inside(self, folder: RunFolder) -> bool:
        shown = [folder.evaluation, folder.evaluation_samples, folder.reward_ensemble, folder.reward_model / QUALITY]
        files = [*_status_files(folder), *shown]
        links = (path for path in {folder.path, *files, *(file.parent for file in files)} if path.is_symlink())
        return all(link.resolve().is_relative_to(self.root) for link in links)


def _fingerprints(folder: RunFolder) -> tuple[object, ...]:
    return tuple((str(path), fingerprint(path)) for path in _status_files(folder))


def _status_files(folder: RunFolder) -> list[Path]:
    return [folder.config, folder.events, folder.metrics, *sorted(folder.path.glob("*/metrics.jsonl"))]


def _row(folder: RunFolder) -> Row:
    known = [found for path in _status_files(folder) if (found := fingerprint(path)) is not None]
    changed = max((mtime_ns / 1e9 for _, _, mtime_ns in known), default=None)
    try:
        return Row(folder.name, changed, read_status(folder))
    except (ValueError, OSError) as error:
        # Other programs write these files: whatever is in them, the list reports it and still shows the other runs.
        return Row(folder.name, changed, RunStatus(folder.name), str(error))
