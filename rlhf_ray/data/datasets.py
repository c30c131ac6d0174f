"""The data of a run: simulated or read, and split into training and held-out records.

Invariant: training data and the data that anything is measured on never share a prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar, get_args

from rlhf_ray.config.data import DataConfig, SimulateConfig, SourceConfig
from rlhf_ray.data.limits import Encoded, LengthLimit
from rlhf_ray.data.readers import Kind, Source, load
from rlhf_ray.data.records import Messages, Record, dialogue_key, prompt_of
from rlhf_ray.data.rows import DataError
from rlhf_ray.data.simulator import SimulatedData, Sizes, simulate

T = TypeVar("T")
Note = Callable[[str], None]
"""Receives messages about what was left out of the data, and why."""
KINDS: tuple[Kind, ...] = get_args(Kind)
SIMULATED_UTILITY = "rlhf_ray.data.simulator:utility_reward"


@dataclass(frozen=True)
class Split:
    """Records of one kind."""

    train: tuple
    held_out: tuple


@dataclass(frozen=True)
class Datasets:
    """All data of a run. A kind that no stage needs is None."""

    demonstrations: Split | None
    pairs: Split | None
    prompts: Split | None
    rankings: Split | None = None
    scores: Split | None = None
    edits: Split | None = None

    @property
    def texts(self) -> list[str]:
        """Every turn of the training demonstrations, to train a tokenizer on."""
        if self.demonstrations is None:
            raise DataError("data.demonstrations is missing: a model that this run builds trains its tokenizer on them")
        return [turn["content"] for record in self.demonstrations.train for turn in record.messages]


def load_datasets(config: DataConfig, folder: Path, seed: int, note: Note) -> Datasets:
    """Read or simulate all data that the config names.

    Args:
        folder: the run folder; simulated data and quarantined lines are written to its `data`.
        note: called with a message for each kind of rows that is left out.

    Raises:
        DataError, FileNotFoundError: naming the source, and the line if one is malformed.
    """
    if config.simulate is not None:
        return _simulate(config, config.simulate, folder / "data", seed)
    return Datasets(**{kind: _read(config, kind, folder, note) for kind in KINDS})


def prompt_limit(config: DataConfig) -> LengthLimit:
    """The length limit of prompts."""
    return LengthLimit(config.max_prompt_tokens, config.too_long, "data.max_prompt_tokens")


def dialogue_limit(config: DataConfig) -> LengthLimit:
    """The length limit of dialogues with answers."""
    return LengthLimit(config.max_dialogue_tokens, config.too_long, "data.max_dialogue_tokens")


def fitting(encoded: Encoded[T], what: str, limit: LengthLimit, note: Note) -> tuple[T, ...]:
    """The items within the limit. `note` receives how many were left out and how many lost turns.

    Raises:
        DataError: no item is within the limit, or one is not and `data.too_long` is `fail`.
    """
    total = encoded.too_long + len(encoded.items)
    if encoded.too_long and limit.too_long == "fail":
        raise DataError(
            f"{encoded.too_long} of {total} {what} are longer than {limit.key} {limit.tokens}, and data.too_long is fail; "
            "raise the limit, or set data.too_long to drop or truncate"
        )
    if not encoded.items:
        raise DataError(f"all {total} {what} are longer than {limit.key} {limit.tokens}; raise it, or use shorter ones")
    if encoded.too_long:
        note(f"{encoded.too_long} of {total} {what} are longer than {limit.key} and left out")
    if encoded.shortened:
        note(f"{encoded.shortened} of {total} {what} lost their oldest turns to fit {limit.key}")
    return encoded.items


def split_held_out(
    records: Sequence[T], prompt_of: Callable[[T], Messages], fraction: float, salt: str = ""
) -> tuple[list[T], list[T]]:
    """(training, held-out) records, both in their order. Raises ValueError for a fraction outside [0, 1]."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"held-out fraction {fraction}: must be between 0 and 1")
    sides: tuple[list[T], list[T]] = ([], [])
    for record in records:
        sides[is_held_out(prompt_of(record), fraction, salt)].append(record)
    return sides


def is_held_out(prompt: Messages, fraction: float, salt: str = "") -> bool:
    """Whether a prompt belongs to the held-out `fraction` (0 to 1)."""
    digest = hashlib.blake2b(salt.encode() + b"\0" + dialogue_key(prompt), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _simulate(config: DataConfig, settings: SimulateConfig, folder: Path, seed: int) -> Datasets:
    sizes = Sizes(**{field.name: getattr(settings, field.name) for field in fields(Sizes)})
    # Simulated data is written completely or not at all, so that of an earlier attempt is complete and, by the seed, the same.
    data = SimulatedData.at(folder) if folder.is_dir() else simulate(folder, seed, sizes)
    held_out = {"pairs": data.held_out_pairs, "prompts": data.held_out_prompts}
    splits = {}
    for kind in KINDS:
        records = load(kind, Source(getattr(data, kind))).records
        if kind in held_out:
            splits[kind] = Split(records, load(kind, Source(held_out[kind])).records)
        elif kind == "edits":
            # Edits are trained on together with the pairs, and measured on the held-out pairs.
            splits[kind] = Split(records, ())
        else:
            splits[kind] = _split(records, config.held_out_fraction)
    return Datasets(**splits)


def _read(config: DataConfig, kind: Kind, folder: Path, note: Note) -> Split | None:
    source: SourceConfig | None = getattr(config, kind)
    if source is None:
        return None
    quarantine = folder / "data" / f"quarantined_{kind}.jsonl"
    where = (source.location, source.format, source.split, source.subset, source.limit)
    loaded = load(kind, Source(*where, config.on_malformed, quarantine))
    if loaded.quarantined:
        note(f"{loaded.quarantined} malformed lines of {source.location} are left out; see data/{quarantine.name}")
    if loaded.without_record:
        note(
            f"{loaded.without_record} rows of {source.location} have no answer that is marked as good; data.{kind} leaves "
            "them out"
        )
    split = _split(loaded.records, config.held_out_fraction)
    if not split.train or not split.held_out:
        raise DataError(
            f"data.{kind}: {len(loaded.records)} records of {source.location} leave {len(split.train)} for training and "
            f"{len(split.held_out)} held out; both need at least one: add records, or change data.held_out_fraction"
        )
    return split


def _split(records: Sequence[Record], fraction: float) -> Split:
    train, held_out = split_held_out(records, prompt_of, fraction)
    return Split(tuple(train), tuple(held_out))
