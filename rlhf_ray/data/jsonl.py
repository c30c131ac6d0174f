"""Rows of a data source, one by one, with their numbers: a JSONL file or a hub data set.

Invariants: rows come in the source's order, numbered from 1 as an editor numbers lines; a line that is no JSON object
is not skipped here but yielded as `Malformed`, since what to do about it is the reader's setting; blank lines are not
rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One row of a source."""

    number: int
    """Line number, from 1."""
    text: str
    """The line as it stands in the file."""
    value: dict[str, Any]


@dataclass(frozen=True)
class Malformed:
    """A line that could not be used, and why."""

    number: int
    text: str
    reason: str


def load_rows(source: str | Path, split: str = "train") -> Iterator[Row | Malformed]:
    """Rows of a JSONL file, or of a hub data set's `split` where `source` is not a path.

    A name with an ending (`pairs.jsonl`), or one that starts with `.`, `~` or `/`, is a path. Raises FileNotFoundError
    for a path where there is no file; what the hub raises passes through.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return _file_rows(path)
    if isinstance(source, Path) or path.suffix or path.exists() or source.startswith((".", "~", "/")):
        raise FileNotFoundError(f"no data file at {path}: give a JSONL file, or a hub name such as owner/name")
    return _hub_rows(source, split)


def _file_rows(path: Path) -> Iterator[Row | Malformed]:
    # Bytes that are no UTF-8 must cost one line, not the file.
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield parse_line(number, line.rstrip("\r\n"))


def parse_line(number: int, text: str) -> Row | Malformed:
    """One line of JSONL."""
    try:
        text.encode("utf-8")
        value = json.loads(text)
    except UnicodeEncodeError:
        return Malformed(number, text, "not UTF-8")
    except json.JSONDecodeError as error:
        return Malformed(number, text, f"not JSON: {error.msg} at column {error.colno}")
    if not isinstance(value, dict):
        return Malformed(number, text, f"not a JSON object but {type(value).__name__}")
    return Row(number, text, value)


def _hub_rows(name: str, split: str) -> Iterator[Row]:
    import datasets

    for number, value in enumerate(datasets.load_dataset(name, split=split), start=1):
        yield Row(number, json.dumps(value, ensure_ascii=False, default=str), value)
