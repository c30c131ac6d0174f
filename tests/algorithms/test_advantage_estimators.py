from __future__ import annotations

import pytest
import torch

from rlhf_ray.algorithms.advantages import EstimatorInput, dr_grpo, gae, grpo, rloo
from rlhf_ray.algorithms.registry import estimator_named
from rlhf_ray.algorithms.rewards import token_rewards

MASK = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 0, 0], [1, 1, 1]], dtype=torch.bool)
SCORES = torch.tensor([1.0, 2.0, 4.0, -1.0], dtype=torch.float64)
GROUPS = torch.tensor([0, 1, 0, 1])


def batch(values: torch.Tensor | None = None) -> EstimatorInput:
    generator = torch.Generator().manual_seed(0)
    logprobs, reference = -torch.rand(2, 4, 3, generator=generator, dtype=torch.float64)
    rewards = token_rewards(SCORES, logprobs, reference, MASK, beta=0.2)
    return EstimatorInput(rewards=rewards, mask=MASK, scores=SCORES, groups=GROUPS, values=values)


@pytest.mark.parametrize(
    ("name", "function"),
    [("rloo", rloo), ("grpo", grpo), ("dr_grpo", dr_grpo)],
)
def test_group_estimators_give_every_valid_token_its_responses_advantage(name: str, function) -> None:
    inputs = batch()
    result = estimator_named(name).compute(inputs)
    expected = function(inputs.rewards.sum(dim=1), GROUPS).unsqueeze(1) * MASK
    assert torch.equal(result.advantages, expected)
    assert result.returns is None


def test_gae_estimator_passes_its_settings_on() -> None:
    values = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)
    inputs = batch(values)
    result = estimator_named("gae").compute(inputs)
    advantages, returns = gae(inputs.rewards, values, MASK, gamma=1.0, lam=0.95)
    assert torch.equal(result.advantages, advantages)
    assert torch.equal(result.returns, returns)


def test_gae_without_a_critic_is_refused_when_it_runs() -> None:
    with pytest.raises(ValueError, match="critic"):
        estimator_named("gae").compute(batch())
