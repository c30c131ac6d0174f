"""KL estimators against enumeration (the policy q samples, p is the reference), and the adaptive coefficient."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from rlhf_ray.algorithms.kl import AdaptiveKL, FixedKL, controller_from_dict, k1, k2, k3, kl_loss, sequence_kl

ONES = torch.ones(6)


def categorical(seed: int, dtype: torch.dtype) -> Tensor:
    logits = torch.randn(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.log_softmax(logits.to(dtype), dim=-1)


def divergence(first: Tensor, second: Tensor) -> Tensor:
    return (first.exp() * (first - second)).sum()


@pytest.mark.parametrize("estimator", [k1, k3])
def test_oracle_08_estimators_are_unbiased_by_enumeration(estimator, precision) -> None:
    q, p = categorical(1, precision.dtype), categorical(2, precision.dtype)
    expected = divergence(q.double(), p.double()).item()
    assert (q.exp() * estimator(q, p, ONES)).sum().item() == pytest.approx(expected, abs=precision.tolerance)


@pytest.mark.parametrize("estimator", [k1, k3])
def test_oracle_08_estimators_are_unbiased_by_sampling(estimator) -> None:
    q, p = categorical(1, torch.float64), categorical(2, torch.float64)
    samples = torch.multinomial(q.exp(), 20_000, replacement=True, generator=torch.Generator().manual_seed(3))
    estimates = estimator(q[samples], p[samples], torch.ones(20_000))
    standard_error = estimates.std() / math.sqrt(20_000)
    assert abs(estimates.mean() - divergence(q, p)) < 4 * standard_error


def expected_gradient(estimator, q_logits: Tensor, p: Tensor) -> Tensor:
    q = torch.log_softmax(q_logits, dim=-1)
    (gradient,) = torch.autograd.grad((q.exp().detach() * estimator(q, p, ONES)).sum(), q_logits)
    return gradient


def test_oracle_09_expected_gradients_as_losses(precision) -> None:
    q_logits = categorical(4, precision.dtype).requires_grad_()
    p = categorical(5, precision.dtype)
    q = torch.log_softmax(q_logits, dim=-1)
    (reverse,) = torch.autograd.grad(divergence(q, p), q_logits, retain_graph=True)
    (forward,) = torch.autograd.grad(divergence(p, q), q_logits)
    expected = {k1: torch.zeros_like(p), k2: reverse, k3: forward}
    assert (reverse - forward).abs().max() > 1e-2, "the two directions must differ for this test to tell them apart"
    for estimator, gradient in expected.items():
        actual = expected_gradient(estimator, q_logits, p)
        torch.testing.assert_close(actual, gradient, atol=precision.tolerance, rtol=0)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_oracle_09_weighed_by_the_ratio_value_and_gradient_are_exact_off_policy(kind: str, precision) -> None:
    """Sampled from another policy than the one being trained: the KL(q||p) of the latter, and its gradient."""
    q_logits, p = categorical(4, precision.dtype).requires_grad_(), categorical(5, precision.dtype)
    sampler, q = categorical(6, precision.dtype), torch.log_softmax(q_logits, dim=-1)
    expected = divergence(q, p)
    actual = (sampler.exp() * kl_loss(kind, q, p, ONES, sampler)).sum()
    torch.testing.assert_close(actual, expected, atol=precision.tolerance, rtol=0)
    gradients = [torch.autograd.grad(value, q_logits, retain_graph=True)[0] for value in (actual, expected)]
    torch.testing.assert_close(*gradients, atol=precision.tolerance, rtol=0)


def test_oracle_09_what_each_estimator_pulls_towards_as_a_reward(precision) -> None:
    """The score-function gradient of an estimate is that of KL(q||p) for k1, and of KL(q||p) - KL(p||q) for k3."""
    q_logits, p = categorical(4, precision.dtype).requires_grad_(), categorical(5, precision.dtype)
    q = torch.log_softmax(q_logits, dim=-1)

    def of(value: Tensor) -> Tensor:
        return torch.autograd.grad(value, q_logits, retain_graph=True)[0]

    reverse, forward = of(divergence(q, p)), of(divergence(p, q))
    for estimator, expected in ((k1, reverse), (k3, reverse - forward)):
        penalties = estimator(q.detach(), p, ONES)
        torch.testing.assert_close(
            of((q.exp().detach() * penalties * q).sum()), expected, atol=precision.tolerance, rtol=0
        )


def test_oracle_10_expected_sum_of_token_k1_is_the_kl_of_the_sequences(tabular_policies) -> None:
    policy, reference, _ = tabular_policies
    q, p = policy.probabilities(), reference.probabilities()
    assert q.sum().item() == pytest.approx(1.0, abs=1e-12)
    estimates = sequence_kl(policy.logprobs(), reference.logprobs(), policy.mask)
    assert (q * estimates).sum().item() == pytest.approx((q * (q / p).log()).sum().item(), abs=1e-9)


@pytest.mark.parametrize("n", [2, 4, 16])
def test_oracle_21_best_of_n_is_log_n_minus_n_minus_one_over_n(n: int) -> None:
    """Over M equally likely answers with distinct rewards; the closed form is the limit of large M, from below."""
    size = 200_000
    rank = torch.arange(1, size + 1, dtype=torch.float64)
    best = (rank / size) ** n - ((rank - 1) / size) ** n
    kl = (best * k1(best.log(), torch.full_like(best, -math.log(size)), torch.ones(size))).sum().item()
    expected = math.log(n) - (n - 1) / n
    assert expected - 1e-3 < kl <= expected + 1e-9


def test_k2_is_half_the_squared_log_ratio() -> None:
    assert k2(torch.tensor([-1.0]), torch.tensor([-3.0]), torch.ones(1)).tolist() == [2.0]


def test_k3_stays_finite_where_its_exponential_would_overflow() -> None:
    logprobs = torch.tensor([-500.0, -1.0], requires_grad=True)
    values = k3(logprobs, torch.tensor([-1.0, -500.0]), torch.ones(2))
    values.sum().backward()
    assert values[0].item() == pytest.approx(math.exp(20.0) - 21.0, rel=1e-5)
    assert values[1].item() == pytest.approx(498.0)
    assert logprobs.grad.tolist() == [0.0, 1.0], "none beyond the cut, all of it on the other side"


def test_k1_is_refused_as_a_loss() -> None:
    arguments = torch.tensor([-1.0]), torch.tensor([-2.0]), torch.ones(1)
    assert torch.equal(kl_loss("k2", *arguments), k2(*arguments))
    assert torch.equal(kl_loss("k3", *arguments), k3(*arguments))
    with pytest.raises(ValueError, match="expected gradient of k1 as a loss is zero; put it in the reward"):
        kl_loss("k1", *arguments)
    with pytest.raises(ValueError, match="k2 has the gradient"):
        kl_loss("k2", *arguments, old_logprobs=arguments[0])
    with pytest.raises(ValueError, match="allowed: k1, k2, k3"):
        kl_loss("k4", *arguments)


def test_oracle_15_adaptive_kl() -> None:
    controller = AdaptiveKL(beta=0.15, target=6.0)
    assert controller.update(9.0, 512).beta == pytest.approx(0.151536, abs=1e-12)
    assert controller.beta == 0.15


@pytest.mark.parametrize(("kl", "error"), [(6.6, 0.1), (5.4, -0.1), (100.0, 0.2), (-3.0, -0.2), (6.0, 0.0)])
def test_error_is_relative_and_clipped_on_both_sides(kl: float, error: float) -> None:
    updated = AdaptiveKL(beta=0.2, target=6.0, horizon=1000.0).update(kl, 100)
    assert updated.beta == pytest.approx(0.2 * (1 + error * 0.1), abs=1e-12)


def test_fixed_kl_stays() -> None:
    assert FixedKL(0.05).update(1e9, 1000) == FixedKL(0.05)


@pytest.mark.parametrize("controller", [FixedKL(0.05), AdaptiveKL(0.15, 6.0, 2000.0).update(7.0, 64)])
def test_state_survives_a_checkpoint(controller) -> None:
    assert controller_from_dict(json.loads(json.dumps(controller.to_dict()))) == controller


def test_bad_settings_and_states_are_named() -> None:
    with pytest.raises(ValueError, match=r"AdaptiveKL.target=0"):
        AdaptiveKL(beta=0.1, target=0.0)
    with pytest.raises(ValueError, match="'pid'"):
        controller_from_dict({"kind": "pid", "beta": 0.1})
