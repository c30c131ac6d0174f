from __future__ import annotations

import math

import pytest
import torch

from rlhf_ray.algorithms.preferences import bradley_terry_loss, centring_penalty, pair_accuracy

FP64 = {"dtype": torch.float64}


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
    chosen, rejected = torch.tensor([2.0, 0.5], **FP64), torch.tensor([1.0, 1.0], **FP64)
    loss = bradley_terry_loss(chosen, rejected, margin=torch.tensor([0.5, 1.0]))
    assert loss.tolist() == pytest.approx([math.log1p(math.exp(-0.5)), math.log1p(math.exp(1.5))], abs=1e-12)
    assert centring_penalty(chosen, rejected).tolist() == [9.0, 2.25]


def test_soft_labels_by_definition_and_the_gradient_in_closed_form() -> None:
    """d loss / d Δ = σ(Δ) - q: zero where the model gives the label's probability."""
    difference = torch.tensor([0.4, -1.0, math.log(0.7 / 0.3)], **FP64, requires_grad=True)
    preference = torch.tensor([1.0, 0.25, 0.7], **FP64)
    loss = bradley_terry_loss(difference, torch.zeros(3, **FP64), preference)
    sigmoid = [1 / (1 + math.exp(-d)) for d in difference.tolist()]
    expected = [-q * math.log(s) - (1 - q) * math.log(1 - s) for q, s in zip(preference.tolist(), sigmoid, strict=True)]
    assert loss.tolist() == pytest.approx(expected, abs=1e-12)
    (gradient,) = torch.autograd.grad(loss.sum(), difference)
    torch.testing.assert_close(gradient, torch.sigmoid(difference.detach()) - preference, atol=1e-9, rtol=0)
    assert gradient[2].item() == pytest.approx(0.0, abs=1e-12)


def test_a_tie_is_least_where_the_rewards_are_equal() -> None:
    costs = bradley_terry_loss(torch.tensor([-1.0, 0.0, 1.0], **FP64), torch.zeros(3, **FP64), 0.5)
    assert costs[1].item() == pytest.approx(math.log(2)) and costs[0] == costs[2] > costs[1]


@pytest.mark.parametrize("reliability", [None, 0.8])
def test_naming_the_responses_the_other_way_round_changes_nothing(reliability) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 9, generator=generator, **FP64)
    preference, margin = torch.rand(2, 9, generator=generator, **FP64)
    eta = None if reliability is None else torch.full((9,), reliability, **FP64)
    loss = bradley_terry_loss(first, second, preference, margin, eta)
    torch.testing.assert_close(bradley_terry_loss(second, first, 1 - preference, margin, eta), loss, atol=1e-12, rtol=0)


def test_reliability_by_definition_and_its_gradient_by_finite_differences() -> None:
    chosen = torch.tensor([1.3, -0.2, -3.0], **FP64, requires_grad=True)
    rejected, eta = torch.tensor([0.5, 0.4, 2.0], **FP64), torch.tensor([0.9, 0.6, 0.75], **FP64)
    loss = bradley_terry_loss(chosen, rejected, reliability=eta)
    sigmoid = torch.sigmoid(chosen - rejected)
    torch.testing.assert_close(loss, -torch.log(eta * sigmoid + (1 - eta) * (1 - sigmoid)), atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(lambda c: bradley_terry_loss(c, rejected, reliability=eta), chosen)


def test_the_loss_of_an_unreliable_label_is_bounded() -> None:
    """However wrong the label, the loss stays below -log(1 - η): this is what makes the fit robust."""
    cost = bradley_terry_loss(torch.tensor([-50.0], **FP64), torch.zeros(1, **FP64), reliability=torch.tensor([0.9]))
    assert cost.item() == pytest.approx(-math.log(0.1), abs=1e-6)


def test_a_tie_is_half_right() -> None:
    assert pair_accuracy(torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 1.0])).tolist() == [1.0, 0.5, 0.0]
