"""JSON Lines files that survive crashes: append whole lines, skip a torn last one, cut back to a step on resume.

Invariants: one process appends to a file; every line but the last is valid, strict JSON (no NaN, no Infinity); a line
without its newline is torn and counts as never written.
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
    """A whole line of a log is not what its writer writes: the file was damaged, or edited."""


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file; none where there is no file. A torn last line is skipped.

    Raises DamagedLine naming file and line where a whole line is not a JSON object: that is damage, not a crash.
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
    """The newest whole record, without reading the rest; None where there is none. Raises DamagedLine where it is no record."""
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


class Closing:
    """A log that its `with` block closes."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class JsonLines:
    """An append-only file. A line survives this process when `append` returns, and the machine after `sync`."""

    def __init__(self, path: str | Path, keep_until_step: int | None) -> None:
        """Open for appending, after dropping a torn last line and every record whose `step` is above `keep_until_step`.

        None drops nothing but the torn line. Raises DamagedLine where a whole line is no record.
        """
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.last: dict[str, Any] | None = _cut(self.path, keep_until_step)
        self._file = open(self.path, "ab")

    def append(self, record: dict[str, Any]) -> None:
        """Write one record. Raises ValueError where it holds NaN or an infinity, TypeError where JSON cannot hold
        it."""
        line = json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n"
        # A lone surrogate, which UTF-8 cannot hold, becomes the escape by which JSON writes it.
        self._file.write(line.encode(errors="backslashreplace"))
        self._file.flush()

    def sync(self) -> None:
        """Wait until everything appended is on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close; closing twice is harmless."""
        if not self._file.closed:
            self.sync()
            self._file.close()


def finite_or_none(value: float) -> float | None:
    """JSON has no NaN and no infinity: null stands for both."""
    return float(value) if math.isfinite(value) else None


def _cut(path: Path, keep_until_step: int | None) -> dict[str, Any] | None:
    """Rewrite the file without what must go, atomically and only where something must; the last record that stays."""
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


def parse_line(line: bytes, path: Path, number: int | None) -> dict[str, Any]:
    """The record of one line; `number` None: the last whole one.

    Raises DamagedLine naming file and line where it holds none.
    """
    try:
        record = json.loads(line)
    except ValueError as error:
        raise damaged(path, number, f"not JSON ({error}). Restore or remove the line.") from error
    if not isinstance(record, dict):
        what = f"a JSON object was expected, not {type(record).__name__}. Restore or remove the line."
        raise damaged(path, number, what)
    return record


def damaged(path: Path, number: int | None, what: str) -> DamagedLine:
    """What is wrong with a line, and where it is; `number` None: the last whole one."""
    return DamagedLine(f"{path}, {'last whole line' if number is None else f'line {number}'}: {what}")
