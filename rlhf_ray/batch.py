"""`Batch`: the sequences of one update, ragged, without a single padding token.

Invariants: columns named *token* have one entry for each of the N tokens; columns of *targets* have one entry for each of the
M tokens that the policy chose (`target_mask`), in order. Prompts and environment tokens are not targets, so whatever runs along
the target columns (GAE, losses, statistics) skips them by construction. Columns of *sequences* have one entry for each of the
B. Splitting a batch never changes a sequence, and the
`weights` already hold the aggregation over the *global* batch, so the sum of the parts' losses is the loss of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from rlhf_ray.types import Rollout


@dataclass(frozen=True)
class Batch:
    """B sequences with N tokens together, M of which are targets."""

    token_ids: np.ndarray
    """int32 [N]."""
    lengths: np.ndarray
    """int64 [B]: tokens of each sequence; their sum is N."""
    target_mask: np.ndarray
    """bool [N]; never set on the first token of a sequence, which nothing predicts."""
    weights: np.ndarray | None = None
    """float32 [M]: loss = Σ weights·token loss, over the global batch."""
    old_logprobs: np.ndarray | None = None
    """float32 [M], nats: the policy before this update (π_old); None: the first pass of the update is it."""
    rollout_logprobs: np.ndarray | None = None
    """float32 [M], nats: the engine that sampled (μ)."""
    reference_logprobs: np.ndarray | None = None
    """float32 [M], nats: the frozen reference."""
    advantages: np.ndarray | None = None
    """float32 [M]."""
    returns: np.ndarray | None = None
    """float32 [M]: what the value model learns."""
    old_values: np.ndarray | None = None
    """float32 [M]: the value model before this update."""
    ptx_weights: np.ndarray | None = None
    """float32 [M]: weights of the cross-entropy at the tokens of demonstrations, 0 at those of rollouts; None: there are none."""
    element_starts: np.ndarray | None = None
    """bool [B]: sequences that begin an element, one label's sequences (a pair, a ranking); None: each is one by itself."""
    labels: np.ndarray | None = None
    """float32 [B, k]: what people said of a sequence; the objective that reads it says what is where."""

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def target_counts(self) -> np.ndarray:
        """int64 [B]: targets of each sequence."""
        ends = np.cumsum(self.lengths)
        cumulative = np.concatenate([[0], np.cumsum(self.target_mask)])
        return cumulative[ends] - cumulative[ends - self.lengths]

    @property
    def element_sizes(self) -> np.ndarray:
        """int64 [E]: sequences of each element."""
        if self.element_starts is None:
            return np.ones(len(self), dtype=np.int64)
        return np.diff(np.append(np.flatnonzero(self.element_starts), len(self)))

    def select_elements(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The sequences of the elements at `indices`, in that order."""
        return self.select(segments(self.element_sizes, np.asarray(indices, dtype=np.int64)))

    def select(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The sequences at `indices`, in that order, with their entries of every column; of whole elements, or of none."""
        indices = np.asarray(indices, dtype=np.int64)
        tokens = segments(self.lengths, indices)
        targets = segments(self.target_counts, indices)
        columns = {name: getattr(self, name)[targets] for name in TARGET_COLUMNS if getattr(self, name) is not None}
        columns |= {name: getattr(self, name)[indices] for name in SEQUENCE_COLUMNS if getattr(self, name) is not None}
        return Batch(self.token_ids[tokens], self.lengths[indices], self.target_mask[tokens], **columns)

    def joined(self, other: Batch) -> Batch:
        """These sequences and then the other's; target columns that one of them lacks are zero there."""
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
        """Inverse of `select(order)` for a target column: float32 [M] of the selection, back in this batch's order."""
        result = np.empty(int(self.target_mask.sum()), dtype=column.dtype)
        result[segments(self.target_counts, np.asarray(order, dtype=np.int64))] = column
        return result

    def with_columns(self, **columns: np.ndarray) -> Batch:
        """The same sequences with some target columns set.

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
    """What a model reads: token ids, laid out in rows, and where in them the targets are predicted."""

    input_ids: torch.Tensor
    """int64 [r, L]: a sequence in each row, or all of them in the only one."""
    positions: torch.Tensor
    """int64 [m]: index into the flattened [r·L] of the token *before* each target: its state predicts the target."""
    targets: torch.Tensor
    """int64 [m]: the target tokens."""
    last: torch.Tensor
    """int64 [b]: flattened index of the last real token of each sequence: where a reward model pools."""
    position_ids: torch.Tensor | None = None
    """int64 [1, L], of sequences that share a row: from 0 in each of them."""
    packed_lengths: tuple[int, ...] | None = None
    """Tokens of each of the b sequences that share the only row; None: a row for each, padded on the right."""


Layout = Callable[[Batch, torch.device], ModelInput]
"""`pad` or `pack`: the same sequences, the same results."""


def pad(batch: Batch, device: torch.device | str = "cpu", pad_id: int = 0) -> ModelInput:
    """A row for each sequence, as wide as the longest. Padding is on the right, where causal attention never looks."""
    width = int(batch.lengths.max())
    flat = np.repeat(np.arange(len(batch)), batch.lengths) * width + _places(batch.lengths)
    ids = np.full(len(batch) * width, pad_id, dtype=np.int64)
    ids[flat] = batch.token_ids
    last = np.arange(len(batch)) * width + batch.lengths - 1
    return ModelInput(
        input_ids=torch.from_numpy(ids.reshape(len(batch), width)).to(device),
        positions=torch.from_numpy(flat[batch.target_mask] - 1).to(device),
        targets=_targets(batch, device),
        last=torch.from_numpy(last).to(device),
    )


def pack(batch: Batch, device: torch.device | str = "cpu") -> ModelInput:
    """All sequences end to end in one row of N tokens, none of them padding; attention must keep them apart."""
    return ModelInput(
        input_ids=torch.from_numpy(batch.token_ids.astype(np.int64)[None]).to(device),
        positions=torch.from_numpy(np.flatnonzero(batch.target_mask) - 1).to(device),
        targets=_targets(batch, device),
        last=torch.from_numpy(np.cumsum(batch.lengths) - 1).to(device),
        position_ids=torch.from_numpy(_places(batch.lengths)[None]).to(device),
        packed_lengths=tuple(batch.lengths.tolist()),
    )


def _targets(batch: Batch, device: torch.device | str) -> torch.Tensor:
    return torch.from_numpy(batch.token_ids[batch.target_mask].astype(np.int64)).to(device)


def _places(lengths: np.ndarray) -> np.ndarray:
    """int64 [N]: the place of each token in its sequence, from 0."""
    return np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def pack_sequences(sequences: Sequence[np.ndarray], target_masks: Sequence[np.ndarray]) -> Batch:
    """Token ids int32 [T_i] and target masks bool [T_i] of B sequences, end to end."""
    return Batch(
        token_ids=np.concatenate(sequences).astype(np.int32, copy=False),
        lengths=np.asarray([len(s) for s in sequences], dtype=np.int64),
        target_mask=np.concatenate(target_masks).astype(bool, copy=False),
    )


def pack_rollouts(rollouts: Sequence[Rollout]) -> Batch:
    """The prompt and the response of each rollout, end to end; the targets are the tokens that the policy chose."""
    return pack_sequences(
        [np.concatenate([r.prompt.token_ids, r.token_ids]) for r in rollouts],
        [np.concatenate([np.zeros(len(r.prompt.token_ids), dtype=bool), r.sampled_mask]) for r in rollouts],
    )


def to_rows(column: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A target column [M] as rows [B, max count], zero-padded on the right, and their bool mask."""
    mask = np.arange(int(counts.max()))[None, :] < counts[:, None]
    rows = np.zeros(mask.shape, dtype=column.dtype)
    rows[mask] = column
    return rows, mask


def segments(counts: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Positions of the segments at `indices` (int64) in a flat array of segments with `counts` entries each."""
    starts = (np.cumsum(counts) - counts)[indices]
    sizes = counts[indices]
    within = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.repeat(starts, sizes) + within
