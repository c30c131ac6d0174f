"""JSON Lines files that survive crashes: lines are appended whole, a torn last line is skipped, and a resume cuts the file back.

Invariants: one process appends to a file; every line except the last is valid, strict JSON (no NaN, no Infinity); a last line
without a newline is torn and counts as never written.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rlhf_ray.errors import InputError
from rlhf_ray.runs.run_folder import atomic_write


class DamagedLine(InputError, ValueError):
    """A complete line of a log is not a valid record: the file was damaged or edited."""


class Closeable:
    """A log that can be used in a `with` block, which closes it."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class JsonLines(Closeable):
    """An append-only file. A line survives a crash of the process after `append`, and of the machine after `sync`."""

    def __init__(self, path: str | Path, keep_until_step: int | None) -> None:
        """Open a file for appending.

        Args:
            keep_until_step: records with a larger `step` are removed first; None keeps all. A torn last line is always removed.

        Raises:
            DamagedLine: a complete line is not a record.
        """
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.last: dict[str, Any] | None = _cut_back(self.path, keep_until_step)
        self._file = open(self.path, "ab")

    def append(self, record: dict[str, Any]) -> None:
        """Write one record. Raises ValueError for NaN or an infinity, and TypeError for values that JSON does not have."""
        line = json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n"
        # UTF-8 cannot hold a lone surrogate; `backslashreplace` writes it as JSON's own escape sequence.
        self._file.write(line.encode(errors="backslashreplace"))
        self._file.flush()

    def sync(self) -> None:
        """Wait until everything appended is on disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close; closing twice is allowed."""
        if not self._file.closed:
            self.sync()
            self._file.close()


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a file; a missing file has none. A torn last line is skipped.

    Raises DamagedLine, which names file and line, if a complete line is not a JSON object.
    """
    path = Path(path)
    if not path.exists():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            yield parse_line(line, path, number)


def last_record(path: str | Path, block: int = 1 << 16) -> dict[str, Any] | None:
    """Read the last complete record without reading the rest; None if there is none. Raises DamagedLine if it is not a record."""
    path = Path(path)
    if not path.exists():
        return None
    with open(path, "rb") as file:
        position, tail = file.seek(0, os.SEEK_END), b""
        while position > 0:
            start = max(0, position - block)
            file.seek(start)
            position, tail = start, file.read(position - start) + tail
            whole = tail[: tail.rfind(b"\n") + 1]
            if whole and (position == 0 or whole.count(b"\n") > 1):
                return parse_line(whole.splitlines()[-1], path, None)
    return None


def parse_line(line: bytes, path: Path, number: int | None) -> dict[str, Any]:
    """Parse one line of a file; `number` None means the last complete line.

    Raises DamagedLine, which names file and line, if it is not a JSON object.
    """
    try:
        record = json.loads(line)
    except ValueError as error:
        raise damaged_line(path, number, f"not JSON ({error}). Restore or remove the line.") from error
    if not isinstance(record, dict):
        what = f"a JSON object was expected, not {type(record).__name__}. Restore or remove the line."
        raise damaged_line(path, number, what)
    return record


def damaged_line(path: Path, number: int | None, problem: str) -> DamagedLine:
    """An error that names the file and the line; `number` None means the last complete line."""
    return DamagedLine(f"{path}, {'last complete line' if number is None else f'line {number}'}: {problem}")


def finite_or_none(value: float) -> float | None:
    """JSON has neither NaN nor infinities: they are written as null."""
    return float(value) if math.isfinite(value) else None


def _cut_back(path: Path, keep_until_step: int | None) -> dict[str, Any] | None:
    """Remove later records and a torn last line, atomically and only if there are any; returns the last record that stays."""
    if not path.exists():
        return None
    kept: list[bytes] = []
    last: dict[str, Any] | None = None
    data = path.read_bytes()
    for number, line in enumerate(data.splitlines(keepends=True), start=1):
        if line.endswith(b"\n"):
            record = parse_line(line, path, number)
            if keep_until_step is None or record.get("step", 0) <= keep_until_step:
                kept.append(line)
                last = record
    if len(whole := b"".join(kept)) < len(data):
        atomic_write(path, whole)
    return last
