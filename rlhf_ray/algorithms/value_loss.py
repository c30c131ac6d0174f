"""The clipped value loss of PPO (OpenAI baselines; checklist item of "The 37 Implementation Details of PPO").

Invariants: elementwise; 0 and without gradient where masked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ValueLoss:
    """Per token, both of the shape of the values."""

    loss: Tensor
    clipped: Tensor
    """bool: the clipped term is the larger one and there is no gradient."""


def ppo_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float | None = 0.2
) -> ValueLoss:
    """`max((v - R)^2, (clip(v, v_old - clip, v_old + clip) - R)^2) / 2` per token; without a clip where it is None.

    values have the gradient; old_values are those that the advantages were computed from; returns are the targets.
    """
    valid = mask.bool()
    values = values.masked_fill(~valid, 0.0)
    returns = returns.detach().masked_fill(~valid, 0.0)
    squared_error = (values - returns).square()
    if clip is None:
        return ValueLoss(loss=0.5 * squared_error, clipped=torch.zeros_like(valid))
    old_values = old_values.detach().masked_fill(~valid, 0.0)
    clipped_error = (values.clamp(old_values - clip, old_values + clip) - returns).square()
    loss = 0.5 * torch.maximum(squared_error, clipped_error)
    return ValueLoss(loss=loss, clipped=clipped_error.detach() > squared_error.detach())
