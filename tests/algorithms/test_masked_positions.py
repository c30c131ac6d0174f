"""What lies under a mask reaches neither a value nor a gradient, whatever it is."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf_ray.algorithms.corrections import importance_weights
from rlhf_ray.algorithms.kl import k1, k2, k3
from rlhf_ray.algorithms.policy_loss import ppo_policy_loss
from rlhf_ray.algorithms.value_loss import ppo_value_loss

MASK = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
JUNK = [math.nan, math.inf, -math.inf, 1e38, -1e38]


def policy(x: Tensor, y: Tensor) -> Tensor:
    return ppo_policy_loss(x, y, y, MASK, dual_clip=3.0).loss


def weighted_policy(x: Tensor, y: Tensor) -> Tensor:
    return ppo_policy_loss(x, y, y, MASK, behaviour_weights=importance_weights(y, 2 * y, MASK)).loss


def junk_weighted_policy(x: Tensor, y: Tensor) -> Tensor:
    return ppo_policy_loss(x, y, y, MASK, behaviour_weights=y).loss


def value(x: Tensor, y: Tensor) -> Tensor:
    return ppo_value_loss(x, y, 2 * y, MASK).loss


LOSSES = {
    "policy": policy,
    "weighted-policy": weighted_policy,
    "junk-weighted-policy": junk_weighted_policy,
    "value": value,
    "k1": lambda x, y: k1(x, y, MASK),
    "k2": lambda x, y: k2(x, y, MASK),
    "k3": lambda x, y: k3(x, y, MASK),
}


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("other_junk", JUNK)
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_junk_under_the_mask_changes_neither_loss_nor_gradient(loss, junk: float, other_junk: float) -> None:
    generator = torch.Generator().manual_seed(0)
    clean, other = -torch.rand(2, 3, 3, generator=generator)
    results = []
    for fill, other_fill in ((0.0, 0.0), (junk, other_junk)):
        x = clean.masked_fill(~MASK, fill).requires_grad_()
        per_token = loss(x, other.masked_fill(~MASK, other_fill))
        per_token.sum().backward()
        assert (per_token[~MASK] == 0).all() and (x.grad[~MASK] == 0).all()
        results.append((per_token.detach(), x.grad))
    (expected, expected_gradient), (actual, gradient) = results
    assert torch.equal(actual, expected) and torch.equal(gradient, expected_gradient)
    assert (expected_gradient[MASK] != 0).any()
