"""Shared by the tests of algorithms: two precisions, and a policy that is small enough to enumerate."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

END = 0
SEQUENCES = [[END], *([first, second] for first in (1, 2) for second in (END, 1, 2))]


@dataclass(frozen=True)
class Precision:
    """Tolerance for comparisons with a closed form."""

    dtype: torch.dtype
    tolerance: float


@pytest.fixture(params=[Precision(torch.float64, 1e-9), Precision(torch.float32, 1e-5)], ids=["fp64", "fp32"])
def precision(request: pytest.FixtureRequest) -> Precision:
    return request.param


@dataclass(frozen=True)
class TabularPolicy:
    """All seven sequences of at most two out of three tokens, where token 0 ends a sequence; one in each row."""

    logits: Tensor
    """Logits, [4, 3] float64: for the first token, and after each of the three first tokens."""

    @property
    def mask(self) -> Tensor:
        return torch.tensor([[True, len(sequence) == 2] for sequence in SEQUENCES])

    def logprobs(self) -> Tensor:
        """[7, 2]; NaN at the padded position, which nothing may read."""
        table = torch.log_softmax(self.logits, dim=-1)
        rows = []
        for sequence in SEQUENCES:
            second = table[1 + sequence[0], sequence[1]] if len(sequence) == 2 else table.new_tensor(float("nan"))
            rows.append(torch.stack([table[0, sequence[0]], second]))
        return torch.stack(rows)

    def probabilities(self) -> Tensor:
        """[7], which sum to 1."""
        return self.logprobs().masked_fill(~self.mask, 0.0).sum(dim=1).exp()


@pytest.fixture
def tabular_policies() -> list[TabularPolicy]:
    """Three different policies; the first has a gradient."""
    generator = torch.Generator().manual_seed(7)
    logits = [torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(3)]
    logits[0].requires_grad_()
    return [TabularPolicy(table) for table in logits]
