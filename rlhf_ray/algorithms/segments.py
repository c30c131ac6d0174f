"""Which sequence each token belongs to: sums along sequences, for packed tokens and for padded rows alike.

Invariant: a sequence is whole wherever it is summed: batches are cut between sequences only, so a sum is the same however
the batch is split, padded or packed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """The sequences of some tokens."""

    index: Tensor
    """int64, of the shape of the tokens: the number of each token's sequence, below `count`."""
    count: int

    @classmethod
    def rows(cls, tokens: Tensor) -> Segments:
        """One sequence in each row of a padded [B, T]."""
        count = len(tokens)
        return cls(torch.arange(count, device=tokens.device).unsqueeze(1).expand(tokens.shape), count)

    @classmethod
    def packed(cls, lengths: Tensor, device: torch.device | str = "cpu") -> Segments:
        """Sequences end to end; `lengths` is int64 [B], tokens of each, on the host, so that no device is waited for."""
        index = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        return cls(index.to(device, non_blocking=True), len(lengths))

    def sum(self, values: Tensor) -> Tensor:
        """[count]: the sum of each sequence's values. Differentiable."""
        return values.new_zeros(self.count).index_add(0, self.index.flatten(), values.flatten())

    def mean(self, values: Tensor, mask: Tensor) -> Tensor:
        """[count]: the mean of each sequence's values, which must be 0 where masked; 0 for a sequence without a token."""
        return self.sum(values) / self.sum(mask.to(values.dtype)).clamp(min=1.0)

    def spread(self, per_sequence: Tensor) -> Tensor:
        """[count] → the shape of the tokens: each gets its sequence's value."""
        return per_sequence[self.index]
