"""The records of a run: simulated or read, split into training and held-out, encoded.

Invariant: what a stage trains on and what anything is measured on never share a prompt.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from rlhf_ray.config.data import DataConfig, SourceConfig
from rlhf_ray.data.readers import DataError, Loaded, Source, load_demonstrations, load_pairs, load_prompts
from rlhf_ray.data.records import Demonstration, Pair, PromptRecord
from rlhf_ray.data.simulator import SimulatedData, Sizes, simulate
from rlhf_ray.data.split import split_held_out
from rlhf_ray.data.tokenize import Encoded

Note = Callable[[str], None]
"""Is told what was left out of the data, and why."""
SIMULATED_UTILITY = "rlhf_ray.data.simulator:utility_reward"


@dataclass(frozen=True)
class Split:
    """Records of one kind."""

    train: tuple
    held_out: tuple


@dataclass(frozen=True)
class Datasets:
    """All that a run reads; a kind that no stage needs is None."""

    demonstrations: Split | None
    pairs: Split | None
    prompts: Split | None
    rankings: Split | None = None
    scores: Split | None = None
    edits: Split | None = None

    @property
    def texts(self) -> list[str]:
        """Every turn of the training dialogues, for a tokenizer. A run that builds a model has demonstrations."""
        return [turn["content"] for record in self.demonstrations.train for turn in record.messages]


def load_datasets(config: DataConfig, folder: Path, seed: int, note: Note) -> Datasets:
    """Read or simulate everything that the config names.

    Args:
        folder: of the run; simulated data and quarantined lines go below its `data`.
        note: told what was left out.

    Raises:
        DataError, FileNotFoundError: naming the source, and the line where one is malformed.
    """
    if config.simulate is not None:
        return _simulated(config, folder / "data", seed)
    return Datasets(
        _read(config, "demonstrations", load_demonstrations, lambda r: r.messages[:-1], folder, note),
        _read(config, "pairs", load_pairs, lambda r: r.prompt, folder, note),
        _read(config, "prompts", load_prompts, lambda r: r.messages, folder, note),
    )


def fitting(encoded: Encoded, what: str, limit: str, note: Note) -> tuple:
    """The items that fit; `note` is told how many do not.

    Raises:
        DataError: none does.
    """
    if not encoded.items:
        raise DataError(f"all {encoded.too_long} {what} are longer than {limit}; raise it, or use shorter ones")
    if encoded.too_long:
        note(
            f"{encoded.too_long} of {encoded.too_long + len(encoded.items)} {what} are longer than {limit} and left out"
        )
    return encoded.items


def _simulated(config: DataConfig, folder: Path, seed: int) -> Datasets:
    sizes = Sizes(**{field.name: getattr(config.simulate, field.name) for field in fields(Sizes)})
    # Simulated data appears whole or not at all, so an earlier attempt's is complete and, by the seed, the same.
    data = SimulatedData.at(folder) if folder.is_dir() else simulate(folder, seed, sizes)
    demonstrations: Sequence[Demonstration] = load_demonstrations(Source(data.demonstrations)).records
    pairs: Sequence[Pair] = load_pairs(Source(data.pairs)).records
    prompts: Sequence[PromptRecord] = load_prompts(Source(data.prompts)).records
    train, held_out = split_held_out(demonstrations, lambda r: r.messages[:-1], config.held_out_fraction)
    return Datasets(
        Split(tuple(train), tuple(held_out)),
        Split(pairs, load_pairs(Source(data.held_out_pairs)).records),
        Split(prompts, load_prompts(Source(data.held_out_prompts)).records),
    )


def _read(
    config: DataConfig, kind: str, load: Callable[[Source], Loaded], prompt_of: Callable, folder: Path, note: Note
) -> Split | None:
    source: SourceConfig | None = getattr(config, kind)
    if source is None:
        return None
    quarantine = folder / "data" / f"quarantined_{kind}.jsonl"
    location = Source(source.location, source.format, source.split, config.on_malformed, quarantine)
    loaded = load(location)
    if loaded.quarantined:
        note(f"{loaded.quarantined} malformed lines of {source.location} are left out; see data/{quarantine.name}")
    records = tuple(itertools.islice(loaded.records, source.limit))
    train, held_out = split_held_out(records, prompt_of, config.held_out_fraction)
    if not train or not held_out:
        raise DataError(
            f"data.{kind}: {len(records)} records of {source.location} leave {len(train)} for training and {len(held_out)} "
            "held out; both need at least one: add records, or change data.held_out_fraction"
        )
    return Split(tuple(train), tuple(held_out))
