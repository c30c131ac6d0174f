"""Follows a JSON Lines file that another process appends to, replaces or deletes.

Invariants: no byte is parsed twice as long as the file only grows; a file that was cut back, replaced or deleted is read from its
start again; a damaged line is passed over and named, for as long as it is there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_ray.runs.jsonl import parse_line

_MARK = 256
"""Bytes before the place where reading stopped, by which a file that only grew is known."""
_SHOWN = 5
"""Damaged lines that are named; the rest is counted."""


class Tail:
    """One file. It holds nothing open between two calls of `advance`."""

    def __init__(self, path: Path, take: Callable[[dict[str, Any]], None], clear: Callable[[], None]) -> None:
        """`take` gets each new record, and may refuse it by a ValueError; `clear` is called before a file is read from its start
        again."""
        self.path, self._take, self._clear = path, take, clear
        self._forget()

    @property
    def problems(self) -> list[str]:
        """What is wrong with the file, as sentences."""
        more = self._damaged - len(self._named)
        return [*self._named, *([f"{self.path}: {more} more lines are damaged."] if more else [])]

    def advance(self) -> None:
        """Read what is new. A last line without its end is left for the next time."""
        try:
            file = open(self.path, "rb")
        except FileNotFoundError:
            self._restart()
            return
        with file:
            start = max(0, self._offset - _MARK)
            file.seek(start)
            if os.fstat(file.fileno()).st_size < self._offset or file.read(self._offset - start) != self._before:
                self._restart()
                file.seek(0)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._read(line)

    def _read(self, line: bytes) -> None:
        self._offset += len(line)
        self._before = (self._before + line)[-_MARK:]
        self._lines += 1
        try:
            record = parse_line(line, self.path, self._lines)
            self._take(record)
        except ValueError as error:
            self._damaged += 1
            if len(self._named) < _SHOWN:
                place = "" if str(self.path) in str(error) else f"{self.path}, line {self._lines}: "
                self._named.append(f"{place}{error}")

    def _restart(self) -> None:
        if self._offset:
            self._clear()
        self._forget()

    def _forget(self) -> None:
        self._offset, self._lines, self._damaged = 0, 0, 0
        self._before = b""
        self._named: list[str] = []


def fingerprint(path: Path) -> tuple[int, int, int] | None:
    """What changes whenever the file does: inode, size in bytes, time of the last change in nanoseconds; None where there is
    none."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
