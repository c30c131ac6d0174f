"""Reads records of one kind from a file or a hub data set, in any format of formats.py.

Invariants: a row gives all its records or is malformed; malformed rows are fatal or quarantined, depending on a setting, and
rows without a record of the requested kind are counted, so no row is lost silently; a source without any record is an error.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rlhf_ray.data.formats import PARSERS, Format, detect_format
from rlhf_ray.data.records import PromptRecord, Record
from rlhf_ray.data.rows import DataError, Malformed, load_rows

OnMalformed = Literal["fail", "quarantine"]
Parsed = Record | tuple[Record, ...]
Kind = Literal["demonstrations", "pairs", "rankings", "scores", "edits", "prompts"]


@dataclass(frozen=True)
class Loaded:
    """The records of one source."""

    records: tuple[Record, ...]
    quarantined: int
    """Number of malformed rows that were left out."""
    without_record: int = 0
    """Number of rows without a record of this kind, such as a tie, which has no answer to imitate."""


@dataclass(frozen=True)
class Source:
    """Where to read from, and what to do with malformed rows."""

    location: str | Path
    """A JSONL, CSV or Parquet file, or the name of a hub data set."""
    format: Format = "auto"
    split: str = "train"
    """Only for hub data sets."""
    subset: str | None = None
    """Only for hub data sets with several subsets."""
    limit: int | None = None
    """Stop after this many records, without reading the rest."""
    on_malformed: OnMalformed = "fail"
    quarantine: Path | None = None
    """File for malformed rows with their numbers and reasons; None: they are only counted."""


def load(kind: Kind, source: Source) -> Loaded:
    """All records of one kind in a source. Each prompt gets an id that is unique in the source.

    Raises FileNotFoundError if there is no such file; DataError if a malformed line is fatal or there is no record.
    """
    loaded = _load(source, PARSERS[kind])
    return replace(loaded, records=tuple(_with_unique_ids(loaded.records))) if kind == "prompts" else loaded


def _with_unique_ids(prompts: Iterable[Record]) -> Iterator[PromptRecord]:
    seen: Counter[str] = Counter()
    for prompt in prompts:
        assert isinstance(prompt, PromptRecord)
        seen[prompt.id] += 1
        again = f"-{seen[prompt.id]}" if seen[prompt.id] > 1 else ""
        yield replace(prompt, id=prompt.id + again)


def _load(source: Source, parsers: dict[Format, Callable[[dict[str, Any]], Parsed]]) -> Loaded:
    records: list[Record] = []
    malformed: list[Malformed] = []
    without_record = 0
    for found in _parsed(source, parsers):
        if not isinstance(found, Malformed):
            found_records = found if isinstance(found, tuple) else (found,)
            without_record += not found_records
            records += found_records
            if source.limit is not None and len(records) >= source.limit:
                break
        elif source.on_malformed == "fail":
            raise DataError(
                f"{source.location}, {found.place}: {found.reason}. "
                f"Correct the {found.unit}, or set data.on_malformed to quarantine to leave malformed {found.unit}s out"
            )
        else:
            malformed.append(found)
    if malformed and source.quarantine:
        lines = ({bad.unit: bad.number, "reason": bad.reason, "text": bad.text} for bad in malformed)
        source.quarantine.parent.mkdir(parents=True, exist_ok=True)
        source.quarantine.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    if not records:
        raise DataError(f"{source.location}{_why_empty(malformed, without_record)}")
    return Loaded(tuple(records[: source.limit]), len(malformed), without_record)


def _why_empty(malformed: Sequence[Malformed], without_record: int) -> str:
    if malformed and not without_record:
        first = malformed[0]
        return f": all {len(malformed)} {first.unit}s are malformed; {first.place}: {first.reason}"
    if without_record:
        return f": no record of this kind in {without_record} valid rows; {len(malformed)} others are malformed"
    return " is empty: it must hold at least one row"


def _parsed(source: Source, parsers: dict[Format, Callable[[dict[str, Any]], Parsed]]) -> Iterator[Parsed | Malformed]:
    format = source.format
    for row in load_rows(source.location, source.split, source.subset, source.limit):
        if isinstance(row, Malformed):
            yield row
            continue
        try:
            if format == "auto":
                format = detect_format(row.value)
            if format not in parsers:
                raise ValueError(
                    f"format {format} has no such records; formats that have them are {', '.join(parsers)}"
                )
            yield parsers[format](row.value)
        except ValueError as error:
            yield row.malformed(str(error))
