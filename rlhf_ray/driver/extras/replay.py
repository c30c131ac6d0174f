"""What a discriminator learns from in one PPO step: the batch's samples, some of older policies, and demonstrations. Pure.

Invariants: every sample of the batch is seen once in each pass; what is drawn beside it is a function of the seed; sequences
that are told apart end with the answer's last token, their only target, where the score is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from rlhf_ray.algorithms.adversarial import balanced_weights
from rlhf_ray.batch import Batch


@dataclass(frozen=True)
class Replay:
    """The newest samples, at most `capacity` of them."""

    capacity: int
    samples: Batch | None = None
    """Oldest first; None: there are none yet."""

    def __len__(self) -> int:
        return 0 if self.samples is None else len(self.samples)

    def added(self, samples: Batch) -> Replay:
        """With a batch of new ones, without the oldest that have no room."""
        everything = samples if self.samples is None else self.samples.joined(samples)
        kept = np.arange(max(0, len(everything) - self.capacity), len(everything))
        return replace(self, samples=everything.select(kept))

    def save(self, path: Path) -> None:
        """Write token ids and lengths as safetensors."""
        token_ids, lengths = (
            (np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int64))
            if self.samples is None
            else (self.samples.token_ids, self.samples.lengths)
        )
        save_file({"token_ids": token_ids, "lengths": lengths}, path)

    def loaded(self, path: Path) -> Replay:
        """With the samples that `save` wrote, as many as this one has room for."""
        columns, empty = load_file(path), replace(self, samples=None)
        saved = scored_at_end(columns["token_ids"], columns["lengths"])
        return empty.added(saved) if len(saved) else empty


def scored_at_end(token_ids: np.ndarray, lengths: np.ndarray) -> Batch:
    """Sequences whose only target is their last token."""
    mask = np.zeros(len(token_ids), dtype=bool)
    mask[np.cumsum(lengths) - 1] = True
    return Batch(token_ids, lengths, mask)


def told_apart(demonstrations: Batch, samples: Batch) -> Batch:
    """Both in one batch, with labels and with weights by which each side counts half."""
    batch = demonstrations.joined(samples)
    demonstrated = np.arange(len(batch)) < len(demonstrations)
    weighted = batch.with_columns(weights=balanced_weights(demonstrated))
    return replace(weighted, labels=demonstrated.astype(np.float32)[:, None])


def discriminator_batches(
    samples: Batch, replay: Replay, replayed: int, demonstrations: Sequence[Batch], count: int, seed: Sequence[int]
) -> list[Batch]:
    """`count` batches for each pass, one after another.

    Args:
        samples: the batch's, at least `count`.
        replay: where `replayed` older ones are drawn from without replacement in each pass, or all there are.
        demonstrations: of each pass, at least `count`.
    """
    generator, result = np.random.default_rng(seed), []
    for shown in demonstrations:
        order = generator.permutation(len(samples))
        drawn = generator.permutation(len(replay))[:replayed]
        deals = zip(*(np.array_split(deck, count) for deck in (order, drawn, np.arange(len(shown)))), strict=True)
        for new, old, positive in deals:
            negatives = samples.select(new)
            if len(old):
                negatives = negatives.joined(replay.samples.select(old))
            result.append(told_apart(shown.select(positive), negatives))
    return result
