"""REINFORCE++ against loops over tokens, and the purpose of its parts."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_ray.algorithms.advantages import reinforce_plus_plus, reinforce_plus_plus_baseline, returns_to_go
from rlhf_ray.algorithms.kl import k1
from rlhf_ray.algorithms.rewards import token_rewards

MASK = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)
SCORES = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
GROUPS = torch.tensor([0, 1, 0, 1])


def logprobs(seed: int) -> torch.Tensor:
    values = -torch.rand(4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.masked_fill(~MASK, math.nan)


def test_returns_are_the_score_minus_the_kl_that_is_still_to_come(precision) -> None:
    policy, reference = logprobs(0).to(precision.dtype), logprobs(1).to(precision.dtype)
    rewards = token_rewards(SCORES.to(precision.dtype), policy, reference, MASK, beta=0.3)
    returns, kl = returns_to_go(rewards, MASK, gamma=1.0), k1(policy, reference, MASK)
    for row in range(4):
        for t in range(4):
            expected = (SCORES[row] - 0.3 * kl[row, t:].sum()).item() if MASK[row, t] else 0.0
            assert returns[row, t].item() == pytest.approx(expected, abs=precision.tolerance)


def test_oracle_10_k1_in_the_reward_with_returns_to_go_is_the_exact_gradient(tabular_policies) -> None:
    """Over enumerated sequences: sum_y pi(y) sum_t R_t grad log pi_t = grad (E score - beta KL(pi || reference))."""
    policy, reference, _ = tabular_policies
    scores, mask, beta = torch.linspace(-1, 2, 7, dtype=torch.float64), policy.mask, 0.4
    probabilities, of_reference = policy.probabilities(), reference.probabilities()
    kl = (probabilities * (probabilities / of_reference).log()).sum()
    (exact,) = torch.autograd.grad((probabilities * scores).sum() - beta * kl, policy.logits, retain_graph=True)
    logprobs = policy.logprobs()

    def gradient(estimator: str) -> torch.Tensor:
        rewards = token_rewards(scores, logprobs, reference.logprobs(), mask, beta, estimator)
        terms = (returns_to_go(rewards, mask, 1.0) * logprobs.masked_fill(~mask, 0.0)).sum(dim=1)
        return torch.autograd.grad((probabilities.detach() * terms).sum(), policy.logits, retain_graph=True)[0]

    torch.testing.assert_close(gradient("k1"), exact, atol=1e-9, rtol=0)
    for other in ("k2", "k3"):
        assert (gradient(other) - exact).abs().max() > 1e-3, "another objective, as their documentation says"


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_advantages_are_returns_whitened_over_all_tokens_of_the_batch(gamma: float) -> None:
    rewards = token_rewards(SCORES, logprobs(0), logprobs(1), MASK, beta=0.3)
    returns = returns_to_go(rewards, MASK, gamma)[MASK]
    expected = (returns - returns.mean()) / returns.std(unbiased=False)
    actual = reinforce_plus_plus(rewards, MASK, gamma)
    torch.testing.assert_close(actual[MASK], expected, atol=1e-7, rtol=0)
    assert (actual[~MASK] == 0).all()


def test_oracle_19_the_mean_over_tokens_is_zero_and_the_variance_one() -> None:
    rewards = token_rewards(SCORES, logprobs(0), logprobs(1), MASK, beta=0.3)
    for advantages in (
        reinforce_plus_plus(rewards, MASK),
        reinforce_plus_plus_baseline(rewards, MASK, SCORES, GROUPS),
    ):
        assert advantages[MASK].mean().item() == pytest.approx(0.0, abs=1e-12)
        assert advantages[MASK].var(unbiased=False).item() == pytest.approx(1.0, abs=1e-6)


def test_the_baseline_takes_away_what_a_prompt_gives_to_all_its_responses() -> None:
    """A constant that is added to the scores of one prompt changes nothing. Without the baseline it does."""
    shift = torch.tensor([0.0, 5.0, 0.0, 5.0], dtype=torch.float64)

    def advantages(scores: torch.Tensor, baseline: bool) -> torch.Tensor:
        rewards = token_rewards(scores, logprobs(0), logprobs(1), MASK, beta=0.3)
        if baseline:
            return reinforce_plus_plus_baseline(rewards, MASK, scores, GROUPS)
        return reinforce_plus_plus(rewards, MASK)

    torch.testing.assert_close(advantages(SCORES + shift, True), advantages(SCORES, True), atol=1e-9, rtol=0)
    assert (advantages(SCORES + shift, False) - advantages(SCORES, False)).abs().max() > 0.1


def test_with_baseline_and_without_kl_it_is_the_whitened_difference_to_the_group_mean() -> None:
    rewards = token_rewards(SCORES, logprobs(0), None, MASK, beta=0.0)
    means = torch.tensor([0.75, 0.5, 0.75, 0.5], dtype=torch.float64)
    per_token = (SCORES - means).unsqueeze(1).expand(4, 4)[MASK]
    expected = (per_token - per_token.mean()) / per_token.std(unbiased=False)
    actual = reinforce_plus_plus_baseline(rewards, MASK, SCORES, GROUPS)
    torch.testing.assert_close(actual[MASK], expected, atol=1e-7, rtol=0)


def test_a_group_of_one_has_no_baseline() -> None:
    with pytest.raises(ValueError, match="REINFORCE..-baseline is undefined for a group of one"):
        reinforce_plus_plus_baseline(torch.zeros(4, 4), MASK, SCORES, torch.tensor([0, 1, 0, 2]))
