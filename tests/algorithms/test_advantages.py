"""Advantage estimators against their formulas, and whitening."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.algorithms.advantages import EstimatorInput, dr_grpo, gae, grpo, rloo, whiten
from rlhf_ray.algorithms.registry import estimator_named
from rlhf_ray.algorithms.rewards import token_rewards
from rlhf_ray.algorithms.statistics import summarise


def random_batch(seed: int, rows: int = 3, length: int = 6, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(2, rows, length, generator=generator, dtype=torch.float64).to(dtype))


def gae_by_definition(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """The sum of equation 16, term by term, for one sequence without holes."""
    following = [*values, 0.0][1:]
    deltas = [r + gamma * after - v for r, v, after in zip(rewards, values, following, strict=True)]
    return [sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, len(deltas))) for t in range(len(deltas))]


def test_oracle_03_gae_with_lambda_one_is_return_minus_value(precision) -> None:
    rewards, values = random_batch(1, dtype=precision.dtype)
    advantages, returns = gae(rewards, values, torch.ones(3, 6), gamma=0.9, lam=1.0)
    for t in range(6):
        discounts = 0.9 ** torch.arange(6 - t, dtype=precision.dtype)
        discounted = (rewards[:, t:] * discounts).sum(dim=1)
        torch.testing.assert_close(advantages[:, t], discounted - values[:, t], atol=precision.tolerance, rtol=0)
        torch.testing.assert_close(returns[:, t], discounted, atol=precision.tolerance, rtol=0)


def test_oracle_03_gae_with_lambda_zero_is_the_td_error(precision) -> None:
    rewards, values = random_batch(2, dtype=precision.dtype)
    advantages, _ = gae(rewards, values, torch.ones(3, 6), gamma=0.9, lam=0.0)
    following = torch.cat([values[:, 1:], torch.zeros(3, 1)], dim=1)
    torch.testing.assert_close(advantages, rewards + 0.9 * following - values, atol=precision.tolerance, rtol=0)


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_oracle_04_score_one_position_later_differs_by_the_closed_form(lam: float, precision) -> None:
    """Score on EOS or on the token after it: A differs by (1 - lam) lam^k (V_after - score), k steps before EOS."""
    _, values = random_batch(3, rows=1, length=5, dtype=precision.dtype)
    score, end = 1.7, 3
    on_end, after_end = torch.zeros_like(values), torch.zeros_like(values)
    on_end[0, end], after_end[0, end + 1] = score, score
    short = torch.tensor([[1, 1, 1, 1, 0]])
    here, _ = gae(on_end, values, short, 1.0, lam)
    later, _ = gae(after_end, values, torch.ones(1, 5), 1.0, lam)
    steps_before_end = torch.arange(end, -1, -1, dtype=precision.dtype)
    expected = (1 - lam) * lam**steps_before_end * (values[0, end + 1] - score)
    difference = (later - here)[0, : end + 1]
    torch.testing.assert_close(difference, expected.to(precision.dtype), atol=precision.tolerance, rtol=0)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    mask=st.lists(st.booleans(), min_size=1, max_size=9),
    gamma=st.floats(0.0, 1.0),
    lam=st.floats(0.0, 1.0),
)
def test_gae_skips_masked_tokens_as_if_they_were_cut_out(seed: int, mask: list[bool], gamma: float, lam: float) -> None:
    rewards, values = random_batch(seed, rows=1, length=len(mask))
    valid = torch.tensor([mask])
    expected = gae_by_definition(rewards[valid].tolist(), values[valid].tolist(), gamma, lam)
    poisoned = [x.masked_fill(~valid, math.nan) for x in (rewards, values)]
    advantages, returns = gae(*poisoned, valid, gamma, lam)
    assert advantages[valid].tolist() == pytest.approx(expected, abs=1e-9)
    torch.testing.assert_close(returns[valid], advantages[valid] + values[valid], atol=1e-9, rtol=0)
    assert (advantages[~valid] == 0).all() and (returns[~valid] == 0).all()


def test_gae_of_a_batch_without_columns_is_empty() -> None:
    advantages, returns = gae(torch.zeros(2, 0), torch.zeros(2, 0), torch.zeros(2, 0), 1.0, 0.95)
    assert advantages.shape == returns.shape == (2, 0)


def test_oracle_11_rloo_is_the_score_minus_the_mean_of_the_others(precision) -> None:
    scores = torch.tensor([1.0, 5.0, 2.0, -3.0, 4.0], dtype=precision.dtype)
    groups = torch.tensor([7, 2, 7, 7, 2])
    expected = torch.tensor(
        [1.0 - (2.0 - 3.0) / 2, 5.0 - 4.0, 2.0 - (1.0 - 3.0) / 2, -3.0 - (1.0 + 2.0) / 2, 4.0 - 5.0],
        dtype=precision.dtype,
    )
    torch.testing.assert_close(rloo(scores, groups), expected, atol=precision.tolerance, rtol=0)


@pytest.mark.parametrize("passes", [1, 2, 5, 7])
def test_oracle_11_grpo_with_binary_rewards(passes: int, precision) -> None:
    size = 8
    scores = (torch.arange(size) < passes).to(precision.dtype)
    rate = passes / size
    advantages = grpo(scores, torch.zeros(size, dtype=torch.int64), eps=0.0)
    shrinkage = math.sqrt((size - 1) / size)
    passed, failed = shrinkage * math.sqrt((1 - rate) / rate), -shrinkage * math.sqrt(rate / (1 - rate))
    expected = [passed] * passes + [failed] * (size - passes)
    assert advantages.tolist() == pytest.approx(expected, abs=precision.tolerance)


@pytest.mark.parametrize("size", [2, 3])
def test_oracle_11_expected_gradients_over_every_group_there_can_be(size: int) -> None:
    """RLOO has the gradient of the expected reward; Dr. GRPO (K - 1) / K of it; GRPO that of another objective."""
    logits = torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([1.0, -2.0, 0.7], dtype=torch.float64)
    logprobs = torch.log_softmax(logits, dim=0)
    (exact,) = torch.autograd.grad((logprobs.exp() * rewards).sum(), logits, retain_graph=True)
    groups = torch.cartesian_prod(*[torch.arange(3)] * size)
    chances = logprobs.detach()[groups].sum(dim=1).exp()

    def expected_gradient(method) -> torch.Tensor:
        advantages = torch.stack([method(rewards[arms], torch.zeros(size, dtype=torch.int64)) for arms in groups])
        surrogate = (chances.unsqueeze(1) * advantages * logprobs[groups]).sum() / size
        return torch.autograd.grad(surrogate, logits, retain_graph=True)[0]

    torch.testing.assert_close(expected_gradient(rloo), exact, atol=1e-9, rtol=0)
    torch.testing.assert_close(expected_gradient(dr_grpo), exact * (size - 1) / size, atol=1e-9, rtol=0)
    direction = torch.cosine_similarity(expected_gradient(grpo), exact, dim=0).item()
    assert 0 < direction < 1 - 1e-3


def test_grpo_with_epsilon_and_without_std() -> None:
    scores, groups = torch.tensor([1.0, 3.0, 10.0, 10.0], dtype=torch.float64), torch.tensor([0, 0, 1, 1])
    standard = math.sqrt(2.0) + 1e-4
    assert grpo(scores, groups).tolist() == pytest.approx([-1 / standard, 1 / standard, 0.0, 0.0], abs=1e-12)
    assert dr_grpo(scores, groups).tolist() == [-1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("method", [rloo, grpo, dr_grpo])
def test_a_group_of_one_is_refused_by_name(method) -> None:
    with pytest.raises(ValueError, match=r"group of one: groups \[4\]"):
        method(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([9, 4, 9]))
    with pytest.raises(ValueError, match="group id for each score"):
        method(torch.tensor([1.0, 2.0]), torch.tensor([9]))


def test_oracle_19_whitening_gives_mean_zero_and_variance_one(precision) -> None:
    x, pad = random_batch(4, rows=5, length=8, dtype=precision.dtype)
    x = 3.0 * x + 2.0
    mask = torch.arange(8) < torch.tensor([8, 3, 1, 5, 0]).unsqueeze(1)
    whitened = whiten(x, mask)[mask]
    variance = x[mask].double().var(unbiased=False)
    assert whitened.mean().item() == pytest.approx(0.0, abs=precision.tolerance)
    expected = (variance / (variance + 1e-8)).item()
    assert whitened.var(unbiased=False).item() == pytest.approx(expected, abs=precision.tolerance)
    assert torch.equal(whiten(torch.where(mask, x, 1e6 * pad), mask), whiten(x, mask))


def test_oracle_19_sharded_whitening_is_global_whitening(precision) -> None:
    x, _ = random_batch(5, rows=6, length=4, dtype=precision.dtype)
    mask = torch.arange(4) < torch.tensor([4, 1, 2, 3, 0, 4]).unsqueeze(1)
    everything = summarise(x[:1], mask[:1]) + summarise(x[1:4], mask[1:4]) + summarise(x[4:], mask[4:])
    sharded = ((x - everything.mean) * (everything.variance + 1e-8) ** -0.5).masked_fill(~mask, 0.0)
    torch.testing.assert_close(sharded, whiten(x, mask), atol=precision.tolerance, rtol=0)


def test_whitening_rewards_keeps_their_mean() -> None:
    x, _ = random_batch(6)
    mask = torch.ones(3, 6)
    kept = whiten(x + 5.0, mask, shift_mean=False)
    assert kept.mean().item() == pytest.approx((x + 5.0).mean().item(), abs=1e-12)
    assert kept.var(unbiased=False).item() == pytest.approx(1.0, abs=1e-7)


def test_whitening_constant_and_empty_batches_gives_zeros() -> None:
    assert (whiten(torch.full((2, 3), 4.0), torch.ones(2, 3)) == 0).all()
    assert (whiten(torch.full((2, 3), math.nan), torch.zeros(2, 3)) == 0).all()


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
