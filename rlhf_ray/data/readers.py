"""Reads records of any kind from a file or a hub data set, in any format of formats.py.

Invariants: one row gives one record or is malformed, never half; malformed rows are fatal or quarantined by a setting,
never silently lost; a source from which nothing can be read is an error whatever the setting.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rlhf_ray.data.formats import PARSERS, Format, detect_format
from rlhf_ray.data.limits import Record
from rlhf_ray.data.records import PromptRecord
from rlhf_ray.data.rows import Malformed, load_rows
from rlhf_ray.errors import InputError

OnMalformed = Literal["fail", "quarantine"]
Kind = Literal["demonstrations", "pairs", "rankings", "scores", "edits", "prompts"]


class DataError(InputError, ValueError):
    """A data source that cannot be used: the message names the source, the line and what is wrong with it."""


@dataclass(frozen=True)
class Loaded:
    """What was read from one source."""

    records: tuple[Record, ...]
    quarantined: int
    """Number of malformed rows left out."""


@dataclass(frozen=True)
class Source:
    """Where to read, and how to treat what is malformed."""

    location: str | Path
    """A JSONL, CSV or Parquet file, or the name of a hub data set."""
    format: Format = "auto"
    split: str = "train"
    """Only for hub data sets."""
    limit: int | None = None
    """Stop after so many records."""
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


def _load(source: Source, parsers: dict[Format, Callable[[dict[str, Any]], Record]]) -> Loaded:
    records: list[Record] = []
    malformed: list[Malformed] = []
    for found in _parsed(source, parsers):
        if not isinstance(found, Malformed):
            records.append(found)
            if len(records) == source.limit:
                break
        elif source.on_malformed == "fail":
            raise DataError(
                f"{source.location}, line {found.number}: {found.reason}. "
                f"Mend the line, or set on_malformed to quarantine to leave such lines out"
            )
        else:
            malformed.append(found)
    if malformed and source.quarantine:
        lines = ({"line": bad.number, "reason": bad.reason, "text": bad.text} for bad in malformed)
        source.quarantine.parent.mkdir(parents=True, exist_ok=True)
        source.quarantine.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    if not records and malformed:
        first = malformed[0]
        raise DataError(
            f"{source.location}: all {len(malformed)} lines are malformed; line {first.number}: {first.reason}"
        )
    if not records:
        raise DataError(f"{source.location} is empty: it must hold at least one row")
    return Loaded(tuple(records), len(malformed))


def _parsed(source: Source, parsers: dict[Format, Callable[[dict[str, Any]], Record]]) -> Iterator[Record | Malformed]:
    format = source.format
    for row in load_rows(source.location, source.split):
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
            yield Malformed(row.number, row.text, str(error))
