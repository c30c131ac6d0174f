"""Rows of a data source, one by one, with their numbers: a file (JSONL, CSV, Parquet) or a hub data set.

Invariants: rows come in the source's order and are read as they are asked for; they are numbered from 1, lines as an editor
numbers them; a line that is no row is not skipped here but yielded as `Malformed`, since what to do about it is the reader's
setting; blank lines are not rows.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One row of a source."""

    number: int
    """Of the line, or of the row in a Parquet file or a hub data set; from 1."""
    text: str
    """The line as it stands in the file, or the row as JSON."""
    value: dict[str, Any]


@dataclass(frozen=True)
class Malformed:
    """A line that could not be used, and why."""

    number: int
    text: str
    reason: str


def load_rows(source: str | Path, split: str = "train") -> Iterator[Row | Malformed]:
    """Rows of a file, or of a hub data set's `split` where `source` is not a path.

    A file's ending says what it is: `.parquet`, `.csv`, and JSONL for any other. A name with an ending (`pairs.jsonl`),
    or one that starts with `.`, `~` or `/`, is a path. Raises FileNotFoundError for a path where there is no file; what
    the hub raises passes through.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return _READERS.get(path.suffix.lower(), _jsonl_rows)(path)
    if isinstance(source, Path) or path.suffix or path.exists() or source.startswith((".", "~", "/")):
        raise FileNotFoundError(
            f"no data file at {path}: give a JSONL, CSV or Parquet file, or a hub name such as owner/name"
        )
    return _hub_rows(source, split)


def _jsonl_rows(path: Path) -> Iterator[Row | Malformed]:
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


def _csv_rows(path: Path) -> Iterator[Row | Malformed]:
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        while True:
            before = reader.line_num
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield Malformed(reader.line_num, "", f"not CSV: {error}")
                continue
            if cells is None:
                return
            number = max(before, 1) + 1  # a cell may hold several lines: the row is where its first one is
            text = ",".join(str(cell) for cell in cells.values())
            if None in cells or None in cells.values():
                yield Malformed(
                    number, text, f"the header names {len(reader.fieldnames or ())} columns; the row has others"
                )
            elif not text.isascii() and any("\udc80" <= character <= "\udcff" for character in text):
                yield Malformed(number, text, "not UTF-8")
            else:
                yield Row(number, text, {key: _cell(cell) for key, cell in cells.items() if cell != ""})


def _cell(text: str) -> Any:
    """Lists and objects that a cell holds as JSON, as they are meant; anything else is text."""
    if text[:1] in "[{" and text[-1:] in "]}":
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text  # in brackets by chance
    return text


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(path) as file:
        values = (value for batch in file.iter_batches(1024) for value in batch.to_pylist())
        yield from (_table_row(number, value) for number, value in enumerate(values, start=1))


def _table_row(number: int, value: dict[str, Any]) -> Row:
    """Tables have every column in every row: an empty cell is a key that is not there."""
    kept = {key: cell for key, cell in value.items() if cell is not None}
    return Row(number, json.dumps(kept, ensure_ascii=False, default=str), kept)


_READERS: dict[str, Callable[[Path], Iterator[Row | Malformed]]] = {".csv": _csv_rows, ".parquet": _parquet_rows}


def _hub_rows(name: str, split: str) -> Iterator[Row]:
    import datasets

    for number, value in enumerate(datasets.load_dataset(name, split=split), start=1):
        yield _table_row(number, value)
