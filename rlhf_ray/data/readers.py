"""Reads records of any kind from a file or a hub data set, in any format of formats.py.

Invariants: one row gives its records or is malformed, never half; malformed rows are fatal or quarantined by a setting, and
rows without a record of the kind that is asked for are counted, so none is silently lost; a source from which nothing can be
read is an error whatever the setting.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rlhf_ray.data.formats import PARSERS, Format, detect_format
from rlhf_ray.data.limits import Record
from rlhf_ray.data.records import PromptRecord
from rlhf_ray.data.rows import DataError, Malformed, load_rows

__all__ = ["DataError", "Kind", "Loaded", "OnMalformed", "Source", "load"]

OnMalformed = Literal["fail", "quarantine"]
Parsed = Record | tuple[Record, ...]
Kind = Literal["demonstrations", "pairs", "rankings", "scores", "edits", "prompts"]


@dataclass(frozen=True)
class Loaded:
    """What was read from one source."""

    records: tuple[Record, ...]
    quarantined: int
    """Number of malformed rows left out."""
    without: int = 0
    """Number of rows that hold no such record: nobody called an answer good enough to imitate."""


@dataclass(frozen=True)
class Source:
    """Where to read, and how to treat what is malformed."""

    location: str | Path
    """A JSONL, CSV or Parquet file, or the name of a hub data set."""
    format: Format = "auto"
    split: str = "train"
    """Only for hub data sets."""
    subset: str | None = None
    """Only for hub data sets that have several: which."""
    limit: int | None = None
    """Stop after so many records; what comes behind them is not read."""
    on_malformed: OnMalformed = "fail"
    quarantine: Path | None = None
    """Where malformed rows are written, with numbers and reasons; None: they are only counted."""


def load(kind: Kind, source: Source) -> Loaded:
    """All records of a kind that a source holds. Prompts get an id that is unique in the source.

    Raises FileNotFoundError where there is no such file; DataError where a line is malformed and that is fatal, or
    where nothing can be read.
    """
    loaded = _load(source, PARSERS[kind])
    return replace(loaded, records=tuple(_with_own_ids(loaded.records))) if kind == "prompts" else loaded


def _with_own_ids(prompts: Iterable[PromptRecord]) -> Iterator[PromptRecord]:
    seen: Counter[str] = Counter()
    for prompt in prompts:
        seen[prompt.id] += 1
        again = f"-{seen[prompt.id]}" if seen[prompt.id] > 1 else ""
        yield replace(prompt, id=prompt.id + again)


def _load(source: Source, parsers: dict[Format, Callable[[dict[str, Any]], Parsed]]) -> Loaded:
    records: list[Record] = []
    malformed: list[Malformed] = []
    without = 0
    for found in _parsed(source, parsers):
        if not isinstance(found, Malformed):
            several = found if isinstance(found, tuple) else (found,)
            without += not several
            records += several
            if source.limit is not None and len(records) >= source.limit:
                break
        elif source.on_malformed == "fail":
            raise DataError(
                f"{source.location}, {found.place}: {found.reason}. "
                f"Mend the {found.unit}, or set on_malformed to quarantine to leave such {found.unit}s out"
            )
        else:
            malformed.append(found)
    if malformed and source.quarantine:
        lines = ({bad.unit: bad.number, "reason": bad.reason, "text": bad.text} for bad in malformed)
        source.quarantine.parent.mkdir(parents=True, exist_ok=True)
        source.quarantine.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    if not records:
        raise DataError(f"{source.location}{_emptiness(malformed, without)}")
    return Loaded(tuple(records[: source.limit]), len(malformed), without)


def _emptiness(malformed: Sequence[Malformed], without: int) -> str:
    if malformed and not without:
        first = malformed[0]
        return f": all {len(malformed)} {first.unit}s are malformed; {first.place}: {first.reason}"
    if without:
        return f": no record of this kind in {without} good rows, besides {len(malformed)} malformed ones"
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
                raise ValueError(f"format {format} holds no such records; those that do are {', '.join(parsers)}")
            yield parsers[format](row.value)
        except ValueError as error:
            yield row.malformed(str(error))
