"""Oracle 1: a task of one token with a known optimum, `pi* ~ reference * exp(reward / beta)`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlhf_ray.algorithms.advantages import gae
from rlhf_ray.algorithms.losses import ppo_policy_loss, ppo_value_loss
from rlhf_ray.algorithms.rewards import token_rewards
from rlhf_ray.algorithms.token_weights import token_weights, weighted_sum

BETA = 0.5
ARMS = 8
REWARDS, REFERENCE_LOGITS = torch.randn(2, ARMS, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
REFERENCE = torch.log_softmax(REFERENCE_LOGITS, dim=-1)
OPTIMUM = torch.softmax(REFERENCE + REWARDS / BETA, dim=-1)
BEST = BETA * torch.logsumexp(REFERENCE + REWARDS / BETA, dim=-1)
EVERY_ARM = torch.ones(ARMS, 1)


def every_reward(logprobs: Tensor) -> Tensor:
    """[ARMS], each arm's reward with its share of the KL penalty."""
    penalised = token_rewards(REWARDS, logprobs.unsqueeze(1), REFERENCE.unsqueeze(1), EVERY_ARM, BETA)
    return penalised.squeeze(1)


def total_variation(logits: Tensor) -> float:
    return 0.5 * (torch.softmax(logits.detach(), dim=-1) - OPTIMUM).abs().sum().item()


@pytest.mark.parametrize("seed", range(5))
def test_oracle_01_regret_is_beta_times_the_kl_to_the_optimum(seed: int) -> None:
    logits = torch.randn(ARMS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logprobs = torch.log_softmax(logits, dim=-1)
    objective = (logprobs.exp() * every_reward(logprobs)).sum()
    kl_to_optimum = (logprobs.exp() * (logprobs - OPTIMUM.log())).sum()
    assert (BEST - objective).item() == pytest.approx((BETA * kl_to_optimum).item(), abs=1e-9)


def test_oracle_01_exact_gradient_reaches_the_optimum() -> None:
    """Every arm, weighted by its probability, at ratio 1: the loss's gradient is the objective's."""
    logits = torch.zeros(ARMS, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=2.0)
    for _ in range(1000):
        logprobs = torch.log_softmax(logits, dim=-1)
        old = logprobs.detach()
        rewards = every_reward(old)
        advantages = rewards - (old.exp() * rewards).sum()
        result = ppo_policy_loss(logprobs, old, advantages, torch.ones(ARMS))
        optimizer.zero_grad()
        weighted_sum(result.loss, old.exp()).backward()
        optimizer.step()
    assert total_variation(torch.zeros(ARMS)) > 0.2, "the start must be far from the optimum"
    assert total_variation(logits) < 1e-3


def test_oracle_01_sampled_ppo_with_a_critic_comes_close() -> None:
    """Rollouts, token rewards, GAE, clipped policy and value losses over minibatches, as in training."""
    generator = torch.Generator().manual_seed(5)
    logits, value = torch.zeros(ARMS, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.AdamW([logits, value], lr=0.05, eps=1e-5, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=120)
    mask, batch, minibatch = torch.ones(512, 1), 512, 128
    for _ in range(120):
        old_table = torch.log_softmax(logits.detach(), dim=-1)
        arms = torch.multinomial(old_table.exp(), batch, replacement=True, generator=generator)
        old, old_values = old_table[arms].unsqueeze(1), value.detach().expand(batch, 1).clone()
        rewards = token_rewards(REWARDS[arms], old, REFERENCE[arms].float().unsqueeze(1), mask, BETA)
        advantages, returns = gae(rewards, old_values, mask, gamma=1.0, lam=0.95)
        for rows in torch.randperm(2 * batch, generator=generator).remainder(batch).split(minibatch):
            logprobs = torch.log_softmax(logits, dim=-1)[arms[rows]].unsqueeze(1)
            policy = ppo_policy_loss(logprobs, old[rows], advantages[rows], mask[rows])
            critic = ppo_value_loss(value.expand(minibatch, 1), old_values[rows], returns[rows], mask[rows])
            optimizer.zero_grad()
            weighted_sum(policy.loss + critic.loss, token_weights("token_mean", mask[rows])).backward()
            optimizer.step()
        schedule.step()
    assert total_variation(logits) < 0.03
    assert value.item() == pytest.approx(BEST.item(), abs=0.05), "at the optimum every arm is worth beta * log Z"
