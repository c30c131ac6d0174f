"""Mean, variance and maximum of masked values, exact over any split of them.

Invariant: `summarise(a) + summarise(b) == summarise(a and b together)` up to float64 rounding, so that micro-batches,
ranks and driver can each hold a part. Sums are float64 tensors on the device of their source: adding them up does not
wait for a GPU, reading `mean` does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Summary:
    """Sums over the valid values; every field is a float64 scalar tensor."""

    count: Tensor
    total: Tensor
    square: Tensor
    largest: Tensor
    """-inf where there was no value."""

    @classmethod
    def empty(cls) -> Summary:
        """Of no values at all; adding it changes nothing."""
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
        """The same on the host, to be sent to another process."""
        return Summary(self.count.cpu(), self.total.cpu(), self.square.cpu(), self.largest.cpu())

    @property
    def mean(self) -> float:
        """Mean of the values. Raises ValueError where there was none."""
        return self.total.item() / self._counted()

    @property
    def variance(self) -> float:
        """Biased (population) variance: defined for a single value, and exact over shards."""
        count = self._counted()
        return max(self.square.item() / count - (self.total.item() / count) ** 2, 0.0)

    @property
    def maximum(self) -> float:
        """Largest value. Raises ValueError where there was none."""
        self._counted()
        return self.largest.item()

    def _counted(self) -> float:
        count = self.count.item()
        if count == 0:
            raise ValueError("no value to summarise: the mask is empty; leave out batches without a single valid token")
        return count


def summarise(values: Tensor, mask: Tensor) -> Summary:
    """Summary of `values` where `mask` is set; any one shape. Detached."""
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
