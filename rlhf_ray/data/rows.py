"""Rows of a data source, one by one, with their numbers: a file (JSONL, CSV, Parquet), or a hub data set or folder of one.

Invariants: rows come in the source's order and are read as they are asked for; they are numbered from 1, lines as an editor
numbers them; a line that is no row is not skipped here but yielded as `Malformed`, since what to do about it is the reader's
setting; blank lines are not rows; a key without a value (null, an empty cell) is not there.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf_ray.errors import InputError

Unit = Literal["line", "row"]
"""What is counted: lines of a text file, or rows of a Parquet file or a hub data set."""


class DataError(InputError, ValueError):
    """A data source that cannot be used: the message names the source, the line and what is wrong with it."""


@dataclass(frozen=True)
class Malformed:
    """A line that could not be used, and why."""

    number: int
    text: str
    reason: str
    unit: Unit = "line"

    @property
    def place(self) -> str:
        """`line 3`."""
        return f"{self.unit} {self.number}"


@dataclass(frozen=True)
class Row:
    """One row of a source."""

    number: int
    """From 1."""
    text: str
    """The line as it stands in the file, or the row as JSON."""
    value: dict[str, Any]
    unit: Unit = "line"

    def malformed(self, reason: str) -> Malformed:
        """The same row, found to be of no use."""
        return Malformed(self.number, self.text, reason, self.unit)


def load_rows(
    source: str | Path, split: str = "train", subset: str | None = None, limit: int | None = None
) -> Iterator[Row | Malformed]:
    """Rows of a file, or of a data set's `split` where `source` is a folder or not a path.

    A file's ending says what it is: `.parquet`, `.csv`, and JSONL for any other. A name with an ending (`pairs.jsonl`),
    or one that starts with `.`, `~` or `/`, is a path. With a `limit` a hub's rows are fetched as they are read, where all
    of a data set is downloaded otherwise; the caller stops. Raises FileNotFoundError for a path where there is nothing, and
    DataError where what is there cannot be read.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return _READERS.get(path.suffix.lower(), _jsonl_rows)(path)
    if not path.is_dir() and (isinstance(source, Path) or path.suffix or source.startswith((".", "~", "/"))):
        raise FileNotFoundError(
            f"no data file at {path}: give a JSONL, CSV or Parquet file, or a hub name such as owner/name"
        )
    return _hub_rows(str(path) if path.is_dir() else str(source), split, subset, streaming=limit is not None)


def _jsonl_rows(path: Path) -> Iterator[Row | Malformed]:
    # Bytes that are no UTF-8 must cost one line, not the file; some editors put a byte order mark before the first.
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
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
    return Row(number, text, _present(value))


def _present(value: dict[str, Any]) -> dict[str, Any]:
    """Tables, and files made of them, have every column in every row: an empty one is a key that is not there."""
    return {key: cell for key, cell in value.items() if cell is not None}


def _csv_rows(path: Path) -> Iterator[Row | Malformed]:
    csv.field_size_limit(2**31 - 1)  # the default refuses a long transcript
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise DataError(f"{path}, line 1: a column stands twice in the header {', '.join(header)}")
        while True:
            number = reader.line_num + 1  # a cell may hold several lines: the row is where its first one is
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield Malformed(number, "", f"not CSV: {error}")
                continue
            if cells is None:
                return
            if cells:
                yield _csv_row(number, header, cells)


def _csv_row(number: int, header: Sequence[str], cells: Sequence[str]) -> Row | Malformed:
    text = ",".join(cells)
    if len(cells) != len(header):
        return Malformed(number, text, f"the header names {len(header)} columns; the row has {len(cells)}")
    try:
        text.encode("utf-8")
        value = {key: _cell(key, cell) for key, cell in zip(header, cells, strict=True) if cell != ""}
    except UnicodeEncodeError:
        return Malformed(number, text, "not UTF-8")
    except ValueError as error:
        return Malformed(number, text, str(error))
    return Row(number, text, value)


_TEXTS = {"prompt", "completion", "chosen", "rejected", "response", "original", "edited", "question", "answer"}
"""Columns in which brackets are a part of the text, unless they hold turns."""


def _cell(column: str, text: str) -> Any:
    """Lists and objects that a cell holds as JSON, as they are meant; anything else is text."""
    if text[0] not in "[{" or text[-1] not in "]}":
        return text
    if re.match(r"\[?\s*\{\s*'(role|content)'", text):
        raise ValueError(f"{column} holds turns in Python's notation; write such cells as JSON (json.dumps)")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text  # in brackets by chance
    turns = isinstance(value, list) and value and all(isinstance(turn, dict) and "role" in turn for turn in value)
    return value if turns or column not in _TEXTS else text


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            values = (value for batch in file.iter_batches(1024) for value in batch.to_pylist())
            yield from (_table_row(number, value) for number, value in enumerate(values, start=1))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error


def _table_row(number: int, value: dict[str, Any]) -> Row:
    kept = _present(value)
    return Row(number, json.dumps(kept, ensure_ascii=False, default=str), kept, "row")


_READERS: dict[str, Callable[[Path], Iterator[Row | Malformed]]] = {".csv": _csv_rows, ".parquet": _parquet_rows}


def _hub_rows(name: str, split: str, subset: str | None, streaming: bool) -> Iterator[Row]:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        found = datasets.load_dataset(name, subset, split=split, streaming=streaming)
        for number, value in enumerate(found, start=1):
            yield _table_row(number, value)
    except (datasets.exceptions.DatasetsError, HfHubHTTPError, OSError, ValueError) as error:
        raise DataError(
            f"{name!r} is no file here, and as a data set (split {split!r}, subset {subset!r}) it cannot be read: {error}"
        ) from error
