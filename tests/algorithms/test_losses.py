"""PPO's losses of policy and value, by cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf_ray.algorithms.losses import decoupled_ppo_policy_loss, ppo_policy_loss, ppo_value_loss
from rlhf_ray.algorithms.token_weights import token_weights, weighted_sum


def gradient_at(ratio: float, advantage: float, **settings: float) -> tuple[float, bool]:
    """Gradient of one token's loss with respect to its log-probability, and the flag `clipped`."""
    logprobs = torch.tensor([math.log(ratio) - 1.0], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-1.0], dtype=torch.float64)
    result = ppo_policy_loss(logprobs, old, torch.tensor([advantage], dtype=torch.float64), torch.ones(1), **settings)
    result.loss.sum().backward()
    return logprobs.grad.item(), bool(result.clipped)


def test_oracle_05_gradient_at_ratio_one_is_the_policy_gradient(precision) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 5, 7, generator=generator, dtype=torch.float64).to(precision.dtype).requires_grad_()
    targets = torch.randint(7, (4, 5), generator=generator)
    advantages = torch.randn(4, 5, generator=generator, dtype=torch.float64).to(precision.dtype)
    mask = torch.arange(5) < torch.tensor([5, 1, 3, 4]).unsqueeze(1)
    logprobs = torch.log_softmax(logits, dim=-1).gather(2, targets.unsqueeze(2)).squeeze(2)
    result = ppo_policy_loss(logprobs, logprobs.detach(), advantages, mask, dual_clip=3.0)
    weights = token_weights("token_mean", mask, dtype=precision.dtype)
    (ppo,) = torch.autograd.grad(weighted_sum(result.loss, weights), logits, retain_graph=True)
    (reinforce,) = torch.autograd.grad(-(advantages * logprobs * mask).sum() / mask.sum(), logits)
    torch.testing.assert_close(ppo, reinforce, atol=precision.tolerance, rtol=0)
    cosine = torch.cosine_similarity(ppo.flatten(), reinforce.flatten(), dim=0).item()
    assert cosine == pytest.approx(1.0, abs=precision.tolerance)
    assert (result.ratio == 1.0).all() and not result.clipped.any()


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize("ratio", [0.01, 0.5, 0.69, 0.71, 0.9, 1.0, 1.1, 1.19, 1.21, 2.0, 50.0])
def test_oracle_06_gradient_is_zero_exactly_where_the_clip_holds(ratio: float, advantage: float) -> None:
    gradient, clipped = gradient_at(ratio, advantage, clip_low=0.3, clip_high=0.2)
    holds = (advantage > 0 and ratio > 1.2) or (advantage < 0 and ratio < 0.7)
    assert clipped == holds
    assert gradient == pytest.approx(0.0 if holds else -advantage * ratio, abs=1e-9)


def test_dual_clip_bounds_the_loss_of_bad_tokens_only() -> None:
    ratios = torch.tensor([2.0, 10.0, 2.0, 10.0], dtype=torch.float64)
    advantages = torch.tensor([-1.0, -1.0, 1.0, 1.0], dtype=torch.float64)
    result = ppo_policy_loss(ratios.log(), torch.zeros(4), advantages, torch.ones(4), dual_clip=3.0)
    torch.testing.assert_close(result.loss, torch.tensor([2.0, 3.0, -1.2, -1.2], dtype=torch.float64))
    assert result.clipped.tolist() == [False, True, True, True]
    assert gradient_at(10.0, -1.0, dual_clip=3.0) == (0.0, True)
    with pytest.raises(ValueError, match="must be > 1"):
        gradient_at(1.0, 1.0, dual_clip=0.9)


def decoupled_inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    logprobs, proximal, behaviour = (-2 * torch.rand(3, 4, 5, generator=generator, dtype=torch.float64)).to(dtype)
    advantages = torch.randn(4, 5, generator=generator, dtype=torch.float64).to(dtype)
    return logprobs, proximal, behaviour, advantages, torch.ones(4, 5)


def test_oracle_13_decoupled_ppo_is_ppo_where_behaviour_and_proximal_policy_agree(precision) -> None:
    logprobs, proximal, _, advantages, mask = decoupled_inputs(precision.dtype)
    decoupled = decoupled_ppo_policy_loss(logprobs, proximal, proximal, advantages, mask)
    assert torch.equal(decoupled.loss, ppo_policy_loss(logprobs, proximal, advantages, mask).loss)


def test_decoupled_ppo_is_the_clipped_objective_times_the_weight(precision) -> None:
    """Term by term: w * min(ratio * A, clip(ratio) * A), w = proximal / behaviour, ratio = current / proximal."""
    logprobs, proximal, behaviour, advantages, mask = decoupled_inputs(precision.dtype)
    loss = decoupled_ppo_policy_loss(logprobs, proximal, behaviour, advantages, mask).loss
    for index in range(loss.numel()):
        current, prox, sampled, a = (x.flatten()[index].item() for x in (logprobs, proximal, behaviour, advantages))
        ratio = math.exp(current - prox)
        objective = math.exp(prox - sampled) * min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
        assert loss.flatten()[index].item() == pytest.approx(-objective, abs=precision.tolerance)


def test_oracle_14_first_step_of_adam_on_the_loss() -> None:
    """lr * g / (|g| + eps), whatever the scale of the gradient; eps is large enough here to show."""
    logprobs = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True)
    before = logprobs.detach().clone()
    advantages = torch.tensor([3.0, -1e-5, 0.2], dtype=torch.float64)
    optimizer = torch.optim.AdamW([logprobs], lr=0.01, eps=1e-5, weight_decay=0.0)
    ppo_policy_loss(logprobs, before, advantages, torch.ones(3)).loss.sum().backward()
    optimizer.step()
    expected = before + 0.01 * advantages / (advantages.abs() + 1e-5)
    torch.testing.assert_close(logprobs.detach(), expected, atol=1e-9, rtol=0)


def test_huge_ratios_stay_finite() -> None:
    logprobs = torch.tensor([0.0, -1000.0, -math.inf], requires_grad=True)
    result = ppo_policy_loss(logprobs, torch.tensor([-1000.0, 0.0, 0.0]), -torch.ones(3), torch.ones(3))
    result.loss.sum().backward()
    assert torch.isfinite(result.loss).all() and torch.isfinite(logprobs.grad).all()


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
