"""`Batch`: the sequences of one update, end to end and without padding, and how a model reads them.

Invariants: *token columns* have one entry for each of the N tokens; *target columns* one for each of the M targets, the tokens
that are learned from (`target_mask`), in order; *sequence columns* one for each of the B sequences. Prompts and an environment's
tokens are not targets, so everything computed along target columns (GAE, losses, statistics) skips them. Splitting a batch
never changes a sequence, and `weights` already hold the aggregation over the *global* batch, so the losses of the parts add up
to the loss of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from rlhf_ray.types import Rollout


@dataclass(frozen=True)
class Batch:
    """B sequences with N tokens in total, of which M are targets."""

    token_ids: np.ndarray
    """int32 [N]."""
    lengths: np.ndarray
    """int64 [B]: number of tokens of each sequence; the sum is N."""
    target_mask: np.ndarray
    """bool [N]; False for the first token of a sequence, which nothing predicts."""
    weights: np.ndarray | None = None
    """float32 [M]: the loss is Σ weights · token loss over the global batch."""
    old_logprobs: np.ndarray | None = None
    """float32 [M], nats: under the policy before this update (π_old); None: taken from the update's first forward pass."""
    rollout_logprobs: np.ndarray | None = None
    """float32 [M], nats: in the engine that sampled the token (μ)."""
    reference_logprobs: np.ndarray | None = None
    """float32 [M], nats: under the frozen reference policy."""
    advantages: np.ndarray | None = None
    """float32 [M]."""
    returns: np.ndarray | None = None
    """float32 [M]: targets of the value model."""
    old_values: np.ndarray | None = None
    """float32 [M]: outputs of the value model before this update."""
    ptx_weights: np.ndarray | None = None
    """float32 [M]: weights of the cross-entropy on demonstrations, 0 for tokens of rollouts; None without demonstrations."""
    element_starts: np.ndarray | None = None
    """bool [B]: the first sequence of each element, the sequences of one label (a pair, a ranking); None: one sequence each."""
    labels: np.ndarray | None = None
    """float32 [B, k]: human feedback on each sequence; the objective that reads the columns defines them."""

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def target_counts(self) -> np.ndarray:
        """int64 [B]: number of targets of each sequence."""
        ends = np.cumsum(self.lengths)
        cumulative = np.concatenate([[0], np.cumsum(self.target_mask)])
        return cumulative[ends] - cumulative[ends - self.lengths]

    @property
    def element_sizes(self) -> np.ndarray:
        """int64 [E]: number of sequences of each element."""
        if self.element_starts is None:
            return np.ones(len(self), dtype=np.int64)
        return np.diff(np.append(np.flatnonzero(self.element_starts), len(self)))

    def select_elements(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The sequences of the elements at `indices`, in that order."""
        return self.select(segments(self.element_sizes, np.asarray(indices, dtype=np.int64)))

    def select(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The sequences at `indices`, in that order, with their entries of every column. Elements must stay whole."""
        indices = np.asarray(indices, dtype=np.int64)
        tokens = segments(self.lengths, indices)
        targets = segments(self.target_counts, indices)
        columns = {name: getattr(self, name)[targets] for name in TARGET_COLUMNS if getattr(self, name) is not None}
        columns |= {name: getattr(self, name)[indices] for name in SEQUENCE_COLUMNS if getattr(self, name) is not None}
        return Batch(self.token_ids[tokens], self.lengths[indices], self.target_mask[tokens], **columns)

    def joined(self, other: Batch) -> Batch:
        """These sequences followed by those of `other`; a target column that one of them lacks is filled with zeros."""
        columns = {}
        for name in TARGET_COLUMNS:
            parts = [getattr(batch, name) for batch in (self, other)]
            if any(part is not None for part in parts):
                columns[name] = np.concatenate([
                    np.zeros(int(batch.target_mask.sum()), dtype=np.float32) if part is None else part
                    for batch, part in zip((self, other), parts, strict=True)
                ])  # fmt: skip
        return Batch(
            np.concatenate([self.token_ids, other.token_ids]),
            np.concatenate([self.lengths, other.lengths]),
            np.concatenate([self.target_mask, other.target_mask]),
            **columns,
        )

    def scatter(self, order: np.ndarray, column: np.ndarray) -> np.ndarray:
        """Inverse of `select(order)` for a target column [M]: its entries in this batch's order."""
        result = np.empty(int(self.target_mask.sum()), dtype=column.dtype)
        result[segments(self.target_counts, np.asarray(order, dtype=np.int64))] = column
        return result

    def with_columns(self, **columns: np.ndarray) -> Batch:
        """The same sequences with new target columns.

        Raises:
            ValueError: a column does not have M entries.
        """
        expected = int(self.target_mask.sum())
        for name, column in columns.items():
            if len(column) != expected:
                raise ValueError(f"column {name} has {len(column)} entries; this batch has {expected} target tokens")
        return replace(self, **columns)


SEQUENCE_COLUMNS = ("element_starts", "labels")
TARGET_COLUMNS = tuple(
    f.name for f in fields(Batch) if f.name not in ("token_ids", "lengths", "target_mask", *SEQUENCE_COLUMNS)
)


@dataclass(frozen=True)
class ModelInput:
    """What a model reads: token ids in rows, and the positions at which the targets are predicted."""

    input_ids: torch.Tensor
    """int64 [r, L]: one sequence per row, or all of them in a single row."""
    positions: torch.Tensor
    """int64 [m]: index in the flattened [r·L] of the token *before* each target, whose hidden state predicts the target."""
    targets: torch.Tensor
    """int64 [m]: the target tokens."""
    last: torch.Tensor
    """int64 [b]: flattened index of the last token of each sequence, where a reward model reads its score."""
    position_ids: torch.Tensor | None = None
    """int64 [1, L] if sequences share a row: they start at 0 in each of them."""
    packed_lengths: tuple[int, ...] | None = None
    """Number of tokens of each of the b sequences in the single row; None: one row per sequence, padded on the right."""


Layout = Callable[[Batch, torch.device], ModelInput]
"""`pad` or `pack`; both give the same results."""


def pad(batch: Batch, device: torch.device | str = "cpu") -> ModelInput:
    """One row per sequence, as wide as the longest. Padding is on the right, where causal attention ignores it."""
    width = int(batch.lengths.max())
    flat = np.repeat(np.arange(len(batch)), batch.lengths) * width + _positions(batch.lengths)
    ids = np.zeros(len(batch) * width, dtype=np.int64)
    ids[flat] = batch.token_ids
    last = np.arange(len(batch)) * width + batch.lengths - 1
    return ModelInput(
        input_ids=torch.from_numpy(ids.reshape(len(batch), width)).to(device),
        positions=torch.from_numpy(flat[batch.target_mask] - 1).to(device),
        targets=_targets(batch, device),
        last=torch.from_numpy(last).to(device),
    )


def pack(batch: Batch, device: torch.device | str = "cpu") -> ModelInput:
    """All sequences end to end in one row of N tokens, without padding; attention must keep them apart."""
    return ModelInput(
        input_ids=torch.from_numpy(batch.token_ids.astype(np.int64)[None]).to(device),
        positions=torch.from_numpy(np.flatnonzero(batch.target_mask) - 1).to(device),
        targets=_targets(batch, device),
        last=torch.from_numpy(np.cumsum(batch.lengths) - 1).to(device),
        position_ids=torch.from_numpy(_positions(batch.lengths)[None]).to(device),
        packed_lengths=tuple(batch.lengths.tolist()),
    )


def _targets(batch: Batch, device: torch.device | str) -> torch.Tensor:
    return torch.from_numpy(batch.token_ids[batch.target_mask].astype(np.int64)).to(device)


def _positions(lengths: np.ndarray) -> np.ndarray:
    """int64 [N]: the position of each token in its sequence, from 0."""
    return np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def pack_sequences(sequences: Sequence[np.ndarray], target_masks: Sequence[np.ndarray]) -> Batch:
    """A batch of B sequences, from their token ids (int32 [T_i]) and target masks (bool [T_i])."""
    return Batch(
        token_ids=np.concatenate(sequences).astype(np.int32, copy=False),
        lengths=np.asarray([len(s) for s in sequences], dtype=np.int64),
        target_mask=np.concatenate(target_masks).astype(bool, copy=False),
    )


def pack_rollouts(rollouts: Sequence[Rollout]) -> Batch:
    """A batch of rollouts with their prompts; the targets are the tokens that the policy sampled."""
    return pack_sequences(
        [np.concatenate([r.prompt.token_ids, r.token_ids]) for r in rollouts],
        [np.concatenate([np.zeros(len(r.prompt.token_ids), dtype=bool), r.sampled_mask]) for r in rollouts],
    )


def to_rows(column: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A target column [M] as rows [B, max count], padded with zeros on the right, and the mask of its entries (bool)."""
    mask = np.arange(int(counts.max()))[None, :] < counts[:, None]
    rows = np.zeros(mask.shape, dtype=column.dtype)
    rows[mask] = column
    return rows, mask


def segments(counts: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Indices (int64) of the entries of the segments at `indices`, in a flat array of segments with `counts` entries each."""
    starts = (np.cumsum(counts) - counts)[indices]
    sizes = counts[indices]
    within = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.repeat(starts, sizes) + within
