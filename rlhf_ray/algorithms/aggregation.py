"""From the masks of a whole minibatch to one weight per token: `loss = sum(weights * token_loss)`.

Invariant: weights are computed once over the *global* minibatch. Whoever later splits it into micro-batches, ranks or
packed rows takes the weights along and *sums*; there is no mean of means. Rows without a valid token change nothing.

Under an engine that averages gradients over R ranks, multiply the local loss by R.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["token_mean", "sequence_mean", "constant"]


def token_weights(
    aggregation: Aggregation, mask: Tensor, max_length: int | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Weights [B, T], 0 where masked.

    - `token_mean`: every token counts the same (DAPO, arXiv 2503.14476): `1 / number of valid tokens`.
    - `sequence_mean`: every sequence counts the same (GRPO, arXiv 2402.03300): `1 / (sequences * its valid tokens)`.
    - `constant`: `1 / (sequences * max_length)`, without a length bias (Dr. GRPO, arXiv 2503.20783); `max_length` is
      the run's response limit in tokens, not the longest in the batch.

    Raises ValueError for an unknown name, a mask without a valid token, or `constant` without a `max_length` >= 1.
    """
    if aggregation not in _AGGREGATIONS:
        raise ValueError(f"unknown aggregation {aggregation!r}; allowed: {', '.join(_AGGREGATIONS)}")
    if aggregation == "constant" and (max_length is None or max_length < 1):
        raise ValueError(
            f"aggregation 'constant' needs max_length >= 1, the response limit in tokens, got {max_length}"
        )
    valid = mask.bool().to(dtype)
    lengths = valid.sum(dim=1, keepdim=True)
    if not lengths.any():
        raise ValueError("a minibatch without a single valid token has no loss; drop it before the update")
    return valid / _AGGREGATIONS[aggregation](lengths, max_length)


def weighted_sum(token_loss: Tensor, weights: Tensor) -> Tensor:
    """`sum(weights * token_loss)`, a scalar: the loss of a minibatch, or of a part of it. Any one shape."""
    return (token_loss * weights).sum()


def _sequences(lengths: Tensor) -> Tensor:
    return (lengths > 0).sum()


_AGGREGATIONS: dict[str, Callable[[Tensor, int | None], Tensor]] = {
    "token_mean": lambda lengths, _: lengths.sum(),
    "sequence_mean": lambda lengths, _: _sequences(lengths) * lengths.clamp(min=1),
    "constant": lambda lengths, max_length: _sequences(lengths) * max_length,
}
