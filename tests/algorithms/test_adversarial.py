"""The discriminator against enumeration: its optimum, its reward, and the effect of label smoothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rlhf_ray.algorithms.adversarial import (
    balanced_weights,
    discriminator_accuracy,
    discriminator_loss,
    imitation_reward,
    is_sufficient,
)


@pytest.fixture
def densities() -> tuple[torch.Tensor, torch.Tensor]:
    """(π_E, π) over seven responses, float64."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((2, 7), generator=generator, dtype=torch.float64)
    expert, policy = logits.softmax(dim=1)
    return expert, policy


def optimum(expert: torch.Tensor, policy: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """The tabular discriminator at the minimum of the expected loss, which is convex in f."""
    logits = torch.zeros_like(expert, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )
    yes, no = torch.ones(7, dtype=torch.bool), torch.zeros(7, dtype=torch.bool)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = (expert * discriminator_loss(logits, yes, smoothing)).sum() + (
            policy * discriminator_loss(logits, no, smoothing)
        ).sum()
        value.backward()
        return value

    for _ in range(5):
        optimizer.step(loss)
    return logits.detach()


def test_the_optimum_is_the_log_ratio_of_the_densities(densities):
    """Oracle 22."""
    expert, policy = densities
    assert torch.allclose(optimum(expert, policy), (expert / policy).log(), atol=1e-6)


def test_the_mean_reward_is_minus_the_kl_from_the_demonstrations(densities):
    """The policy's mean reward at the optimum is −KL(π ‖ π_E), and the reward is zero if both are equal."""
    expert, policy = densities
    reward = imitation_reward(optimum(expert, policy), clip=50.0)
    assert float((policy * reward).sum()) == pytest.approx(-float((policy * (policy / expert).log()).sum()), abs=1e-6)
    assert optimum(expert, expert).abs().max() < 1e-6


def test_policy_gradient_on_the_reward_imitates(densities):
    """Exact gradient ascent of E_π[f*], f* held fixed and renewed after every step, brings π to π_E."""
    expert, policy = densities
    logits = policy.log().clone()
    for _ in range(400):
        policy = logits.softmax(0)
        reward = (expert / policy).log()
        logits += policy * (reward - (policy * reward).sum()) / policy.max()
    assert 0.5 * (logits.softmax(0) - expert).abs().sum() < 1e-3


def test_smoothing_bounds_the_confidence(densities):
    expert, policy = densities
    found = optimum(expert, policy, smoothing=0.1)
    assert torch.allclose(found, (0.9 * expert / (policy + 0.1 * expert)).log(), atol=1e-6)
    assert found.max() < math.log(0.9 / 0.1)
    with pytest.raises(ValueError, match=r"0\.5"):
        discriminator_loss(found, torch.ones(7, dtype=torch.bool), smoothing=0.5)


def test_each_side_has_half_of_the_weight_and_logits_of_zero_cost_log_2():
    demonstrated = np.asarray([True, False, False, False, True])
    weights = balanced_weights(demonstrated)
    assert weights[demonstrated].sum() == weights[~demonstrated].sum() == pytest.approx(0.5)
    flags = torch.from_numpy(demonstrated)
    assert float((torch.from_numpy(weights) * discriminator_loss(torch.zeros(5), flags)).sum()) == pytest.approx(
        math.log(2)
    )
    assert discriminator_accuracy(torch.tensor([2.0, -1.0, 3.0, 0.0, -1.0]), flags).tolist() == [1, 1, 0, 0.5, 0]
    with pytest.raises(ValueError, match="0 demonstrations and 5 samples"):
        balanced_weights(np.zeros(5, dtype=bool))


def test_updates_are_skipped_if_accuracy_and_loss_suffice():
    """At 0.8 the loss of a calibrated discriminator is 0.5004. With logits near 0 it is log 2, and updates continue."""
    assert is_sufficient(0.9, 0.5, 0.8) and not is_sufficient(0.9, 0.501, 0.8)
    assert not is_sufficient(0.8, 0.3, 0.8)
    assert not is_sufficient(1.0, math.log(2), 0.6)
    assert not is_sufficient(1.0, 0.0, 1.0), "1 is no bound"


def test_far_out_logits_stay_finite_and_the_reward_is_clipped():
    logits = torch.tensor([400.0, -400.0], requires_grad=True)
    loss = discriminator_loss(logits, torch.tensor([False, True]))
    assert loss.tolist() == [400.0, 400.0]
    loss.sum().backward()
    assert logits.grad.tolist() == [1.0, -1.0]
    assert imitation_reward(logits, 5.0).tolist() == [5.0, -5.0]
