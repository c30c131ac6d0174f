from __future__ import annotations

import math

import pytest
import torch

from rlhf_ray.algorithms.losses import ppo_value_loss


def loss_and_gradient(value: float, old: float, target: float, clip: float, dtype=torch.float64):
    values = torch.tensor([value], dtype=dtype, requires_grad=True)
    result = ppo_value_loss(values, values.new_tensor([old]), values.new_tensor([target]), torch.ones(1), clip=clip)
    result.loss.sum().backward()
    return result.loss.item(), values.grad.item(), bool(result.clipped)


def test_oracle_07_value_clip(precision) -> None:
    loss, gradient, clipped = loss_and_gradient(0.5, old=0.0, target=1.0, clip=0.2, dtype=precision.dtype)
    assert loss == pytest.approx(0.5 * 0.64, abs=precision.tolerance)
    assert gradient == 0.0
    assert clipped


@pytest.mark.parametrize(
    ("value", "clip", "expected"),
    [
        (0.1, 0.2, (0.5 * 0.81, -0.9, False)),
        (-0.5, 0.2, (0.5 * 2.25, -1.5, False)),
        (0.5, math.inf, (0.5 * 0.25, -0.5, False)),
    ],
    ids=["inside", "outside-and-worse", "no-clip"],
)
def test_unclipped_cases_are_half_the_squared_error(value: float, clip: float, expected) -> None:
    assert loss_and_gradient(value, old=0.0, target=1.0, clip=clip) == pytest.approx(expected, abs=1e-12)
