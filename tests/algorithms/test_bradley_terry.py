from __future__ import annotations

import math

import pytest
import torch

from rlhf_ray.algorithms.preference import bradley_terry_loss, pair_accuracy


@pytest.mark.parametrize("win_rate", [0.1, 0.5, 0.7, 0.95])
def test_oracle_20_two_items_are_apart_by_the_logit_of_the_win_rate(win_rate: float) -> None:
    wins = round(win_rate * 100)
    rewards = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    chosen = torch.tensor([0] * wins + [1] * (100 - wins))
    optimizer = torch.optim.LBFGS([rewards], max_iter=200, tolerance_grad=1e-13, tolerance_change=0.0)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = bradley_terry_loss(rewards[chosen], rewards[1 - chosen]).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    difference = (rewards[0] - rewards[1]).item()
    assert difference == pytest.approx(math.log(win_rate / (1 - win_rate)), abs=1e-9)


def test_oracle_20_a_shift_leaves_the_loss_unchanged(precision) -> None:
    chosen, rejected = torch.tensor([[0.3, -2.0, 1.0], [0.1, 1.5, 1.0]], dtype=precision.dtype)
    shifted = bradley_terry_loss(chosen + 5.0, rejected + 5.0)
    torch.testing.assert_close(shifted, bradley_terry_loss(chosen, rejected), atol=precision.tolerance, rtol=0)


def test_equal_rewards_cost_log_two_and_extreme_ones_stay_finite() -> None:
    equal = torch.zeros(1, dtype=torch.float64)
    assert bradley_terry_loss(equal, equal).item() == pytest.approx(math.log(2), abs=1e-15)
    assert bradley_terry_loss(equal - 1e4, equal).item() == pytest.approx(1e4)
    assert bradley_terry_loss(equal + 1e4, equal).item() == pytest.approx(0.0)


def test_margin_and_centring_by_definition() -> None:
    chosen, rejected = torch.tensor([2.0, 0.5], dtype=torch.float64), torch.tensor([1.0, 1.0], dtype=torch.float64)
    loss = bradley_terry_loss(chosen, rejected, margin=torch.tensor([0.5, 1.0]), centring=0.01)
    expected = [math.log1p(math.exp(-0.5)) + 0.01 * 9, math.log1p(math.exp(1.5)) + 0.01 * 2.25]
    assert loss.tolist() == pytest.approx(expected, abs=1e-12)


def test_a_tie_is_half_right() -> None:
    assert pair_accuracy(torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 1.0])).tolist() == [1.0, 0.5, 0.0]
