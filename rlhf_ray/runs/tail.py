"""Follows a JSON Lines file that another process appends to, replaces or deletes.

Invariants: no byte is parsed twice as long as the file only grows; a file that was cut back, replaced or deleted is read from the
start again; a damaged line is skipped and reported for as long as it exists.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_ray.runs.jsonl import parse_line

_OVERLAP_BYTES = 256
"""Bytes before the current position that are compared to recognise a file that only grew."""
_MAX_NAMED = 5
"""Damaged lines that are reported one by one; the rest are counted."""


class Tail:
    """Follows one file. No file stays open between two calls of `read_new`."""

    _overlap: bytes

    def __init__(self, path: Path, on_record: Callable[[dict[str, Any]], None], on_restart: Callable[[], None]) -> None:
        """`on_record` gets each new record and may reject it with ValueError. `on_restart` is called before the file is read from
        the start again."""
        self.path, self._on_record, self._on_restart = path, on_record, on_restart
        self._reset()

    @property
    def problems(self) -> list[str]:
        """What is wrong with the file, in sentences."""
        more = self._damaged - len(self._named)
        return [*self._named, *([f"{self.path}: {more} more lines are damaged."] if more else [])]

    def read_new(self) -> None:
        """Read the new records. A last line without a newline is left for the next call."""
        try:
            file = open(self.path, "rb")
        except FileNotFoundError:
            self._restart()
            return
        with file:
            start = max(0, self._offset - _OVERLAP_BYTES)
            file.seek(start)
            if os.fstat(file.fileno()).st_size < self._offset or file.read(self._offset - start) != self._overlap:
                self._restart()
                file.seek(0)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._read_line(line)

    def _read_line(self, line: bytes) -> None:
        self._offset += len(line)
        self._overlap = (self._overlap + line)[-_OVERLAP_BYTES:]
        self._lines += 1
        try:
            self._on_record(parse_line(line, self.path, self._lines))
        except ValueError as error:
            self._damaged += 1
            if len(self._named) < _MAX_NAMED:
                place = "" if str(self.path) in str(error) else f"{self.path}, line {self._lines}: "
                self._named.append(f"{place}{error}")

    def _restart(self) -> None:
        if self._offset:
            self._on_restart()
        self._reset()

    def _reset(self) -> None:
        self._offset, self._lines, self._damaged = 0, 0, 0
        self._overlap = b""
        self._named: list[str] = []


def fingerprint(path: Path) -> tuple[int, int, int] | None:
    """Inode, size in bytes and modification time in nanoseconds: it changes whenever the file does. None if there is no file."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
