"""Values at masked positions change neither a result nor a gradient."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf_ray.algorithms.kl import k1, k2, k3, kl_loss
from rlhf_ray.algorithms.losses import Clip, PolicyTokens, ppo_policy_loss, ppo_value_loss
from rlhf_ray.algorithms.registry import POLICY_LOSSES, policy_loss_named
from rlhf_ray.algorithms.statistics import Segments
from rlhf_ray.algorithms.token_weights import importance_weights

MASK = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
JUNK = [math.nan, math.inf, -math.inf, 1e38, -1e38]


def policy(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        kind = policy_loss_named(name)
        clip = Clip(0.2, 0.2, 3.0 if kind.has_dual_clip else None)
        return kind.compute(PolicyTokens(x, y, 2 * y, y, MASK, Segments.rows(MASK)), clip).loss

    return loss


def corrected_policy(level: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: ppo_policy_loss(x, y, y, MASK).weighted(importance_weights(y, 2 * y, MASK, level=level)).loss


def value(x: Tensor, y: Tensor) -> Tensor:
    return ppo_value_loss(x, y, 2 * y, MASK).loss


LOSSES = {
    **{name: policy(name) for name in POLICY_LOSSES},
    **{f"{level}-corrected": corrected_policy(level) for level in ("token", "sequence")},
    "value": value,
    "k1": lambda x, y: k1(x, y, MASK),
    "k2": lambda x, y: k2(x, y, MASK),
    "k3": lambda x, y: k3(x, y, MASK),
    "k3-weighted": lambda x, y: kl_loss("k3", x, y, MASK, 2 * y),
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
