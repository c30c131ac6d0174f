"""Mean, variance and maximum of masked values, exact over any split of them.

Invariant: `summarise(a) + summarise(b) == summarise(a and b together)` up to float64 rounding, so that micro-batches,
ranks and the driver can each hold a part. Sums are float64 tensors on the device of their source: adding them does not wait
for a GPU, reading `mean` does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Summary:
    """Sums over the valid values; every field is a float64 scalar tensor."""

    count: Tensor
    total: Tensor
    square: Tensor
    largest: Tensor
    """-inf if there was no value."""

    @classmethod
    def empty(cls) -> Summary:
        """The summary of no values. Adding it changes nothing."""
        zero = torch.zeros((), dtype=torch.float64)
        return cls(zero, zero, zero, torch.full((), -torch.inf, dtype=torch.float64))

    def __add__(self, other: Summary) -> Summary:
        return Summary(
            count=self.count + other.count,
            total=self.total + other.total,
            square=self.square + other.square,
            largest=torch.maximum(self.largest, other.largest),
        )

    def cpu(self) -> Summary:
        """A copy in host memory, to be sent to another process."""
        return Summary(self.count.cpu(), self.total.cpu(), self.square.cpu(), self.largest.cpu())

    @property
    def mean(self) -> float:
        """Mean of the values. Raises ValueError if there were none."""
        return self.total.item() / self._counted()

    @property
    def variance(self) -> float:
        """Biased (population) variance: defined for a single value, and exact over shards."""
        count = self._counted()
        return max(self.square.item() / count - (self.total.item() / count) ** 2, 0.0)

    @property
    def maximum(self) -> float:
        """Largest value. Raises ValueError if there were none."""
        self._counted()
        return self.largest.item()

    def _counted(self) -> float:
        count = self.count.item()
        if count == 0:
            raise ValueError(
                "there are no values to summarise: the mask is empty; leave out batches without a valid token"
            )
        return count


def summarise(values: Tensor, mask: Tensor) -> Summary:
    """Summary of `values` where `mask` is set; both have the same shape. Detached."""
    valid = mask.bool()
    kept = values.detach().double().masked_fill(~valid, 0.0)
    largest = values.detach().double().masked_fill(~valid, -torch.inf)
    bottom = largest.new_full((1,), -torch.inf)
    return Summary(
        count=valid.sum(dtype=torch.float64),
        total=kept.sum(),
        square=kept.square().sum(),
        largest=torch.cat([bottom, largest.flatten()]).max(),
    )


@dataclass(frozen=True)
class Segments:
    """Assigns tokens to sequences."""

    index: Tensor
    """int64, with the shape of the tokens: the index of each token's sequence, below `count`."""
    count: int

    @classmethod
    def rows(cls, tokens: Tensor) -> Segments:
        """One sequence in each row of a padded [B, T]."""
        count = len(tokens)
        return cls(torch.arange(count, device=tokens.device).unsqueeze(1).expand(tokens.shape), count)

    @classmethod
    def packed(cls, lengths: Tensor, device: torch.device | str = "cpu") -> Segments:
        """Sequences end to end; `lengths` is int64 [B], in host memory so that no device is waited for."""
        index = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        return cls(index.to(device, non_blocking=True), len(lengths))

    def sum(self, values: Tensor) -> Tensor:
        """[count]: the sum of each sequence's values. Differentiable."""
        return values.new_zeros(self.count).index_add(0, self.index.flatten(), values.flatten())

    def mean(self, values: Tensor, mask: Tensor) -> Tensor:
        """[count]: the mean of each sequence's values, which must be 0 where masked; 0 for a sequence without a token."""
        return self.sum(values) / self.sum(mask.to(values.dtype)).clamp(min=1.0)

    def spread(self, per_sequence: Tensor) -> Tensor:
        """From [count] to the shape of the tokens: each token gets the value of its sequence."""
        return per_sequence[self.index]


Z_95 = 1.959964


@dataclass(frozen=True)
class Share:
    """A proportion of cases with its 95 % interval (Wilson, JASA 1927)."""

    value: float
    low: float
    high: float
    count: int
    """Number of cases."""


def win_rate(ours: np.ndarray, theirs: np.ndarray) -> Share | None:
    """Share of prompts on which `ours` is higher, both float64 [P]. Prompts with a NaN are left out; None if all are."""
    differences = ours - theirs
    known = differences[~np.isnan(differences)]
    return positive_share(known) if len(known) else None


def positive_share(differences: np.ndarray) -> Share:
    """The share of positive differences, where zeros count half; [c], c ≥ 1."""
    won = float((differences > 0).sum() + 0.5 * (differences == 0).sum())
    return wilson(won, len(differences))


def wilson(successes: float, count: int) -> Share:
    """A share and its interval, by inversion of the normal test: `(p + z²/2n ± z√(p(1−p)/n + z²/4n²)) / (1 + z²/n)`."""
    share, z2 = successes / count, Z_95**2 / count
    centre = (share + z2 / 2) / (1 + z2)
    half = Z_95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count)) / (1 + z2)
    return Share(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)), count)
