"""The rows of a data source with their numbers. A source is a file (JSONL, CSV, Parquet), a hub data set, or a folder of one.

Invariants: rows come in the source's order and are read lazily; they are numbered from 1, lines as in an editor; a line that
is not a row is yielded as `Malformed`, because a setting of the caller decides what to do with it; blank lines are skipped; a
key without a value (null, an empty cell) is removed.
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
"""What the numbers count: lines of a text file, or rows of a Parquet file or a hub data set."""


class DataError(InputError, ValueError):
    """A data source cannot be used. The message names the source, the line and the problem."""


@dataclass(frozen=True)
class Malformed:
    """A row that cannot be used, and the reason."""

    number: int
    text: str
    reason: str
    unit: Unit = "line"

    @property
    def place(self) -> str:
        """Such as `line 3`."""
        return f"{self.unit} {self.number}"


@dataclass(frozen=True)
class Row:
    """One row of a source."""

    number: int
    """From 1."""
    text: str
    """The line as it is in the file, or the row as JSON."""
    value: dict[str, Any]
    unit: Unit = "line"

    def malformed(self, reason: str) -> Malformed:
        """This row as a malformed one."""
        return Malformed(self.number, self.text, reason, self.unit)


def load_rows(
    source: str | Path, split: str = "train", subset: str | None = None, limit: int | None = None
) -> Iterator[Row | Malformed]:
    """Rows of a file, or of a data set's `split` where `source` is a folder or not a path.

    The file type follows from the suffix: `.parquet`, `.csv`, and JSONL for all others. A name with a suffix
    (`pairs.jsonl`), or one that starts with `.`, `~` or `/`, is a path. With a `limit`, the rows of a hub data set are
    streamed instead of downloaded all at once; the caller stops at the limit. Raises FileNotFoundError if a path does not
    exist, and DataError if the source cannot be read.
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
    # Invalid UTF-8 makes one line malformed, not the file. Some editors write a byte order mark before the first line.
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
    """Without null values: tables, and files made from them, have every column in every row."""
    return {key: cell for key, cell in value.items() if cell is not None}


def _csv_rows(path: Path) -> Iterator[Row | Malformed]:
    csv.field_size_limit(2**31 - 1)  # the default refuses a long transcript
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise DataError(f"{path}, line 1: a column is twice in the header {', '.join(header)}")
        while True:
            number = reader.line_num + 1  # a cell may have several lines; a row has the number of its first line
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
"""Columns in which text in brackets stays text, unless it is a list of turns."""


def _cell(column: str, text: str) -> Any:
    """The value of a cell: JSON lists and objects are parsed, everything else is text."""
    if text[0] not in "[{" or text[-1] not in "]}":
        return text
    if re.match(r"\[?\s*\{\s*'(role|content)'", text):
        raise ValueError(f"{column} holds turns in Python's notation; write such cells as JSON (json.dumps)")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text  # in brackets, but not JSON
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
            f"{name!r} is not a file, and cannot be read as a data set (split {split!r}, subset {subset!r}): {error}"
        ) from error
