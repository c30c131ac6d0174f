"""Every policy loss against its formula, its gradient in closed form, and enumeration."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf_ray.algorithms.losses import Clip, PolicyTokens
from rlhf_ray.algorithms.registry import POLICY_LOSSES, policy_loss_named
from rlhf_ray.algorithms.statistics import Segments
from rlhf_ray.algorithms.token_weights import token_weights, weighted_sum

LENGTHS = torch.tensor([5, 1, 3, 4])
MASK = torch.arange(5) < LENGTHS.unsqueeze(1)
CLIP = Clip(0.2, 0.3)


def example(dtype: torch.dtype, spread: float = 0.8, per_response: bool = False) -> PolicyTokens:
    """Four sequences whose ratios are on both sides of both bounds."""
    generator = torch.Generator().manual_seed(3)
    old, change, other, advantages = torch.randn(4, 4, 5, generator=generator, dtype=torch.float64).to(dtype)
    if per_response:
        advantages = advantages[:, :1].expand(4, 5)
    logprobs = (old + spread * change).requires_grad_()
    return PolicyTokens(logprobs, old, old + 0.2 * other, advantages, MASK, Segments.rows(MASK))


def gradient(name: str, tokens: PolicyTokens, weights: Tensor, clip: Clip = CLIP) -> Tensor:
    loss = weighted_sum(policy_loss_named(name).compute(tokens, clip).loss, weights)
    return torch.autograd.grad(loss, tokens.logprobs)[0]


def clipped(ratio: Tensor, advantages: Tensor) -> Tensor:
    return ((advantages > 0) & (ratio > 1.3)) | ((advantages < 0) & (ratio < 0.8))


def closed_form(name: str, tokens: PolicyTokens, weights: Tensor) -> Tensor:
    """The derivative of the weighted loss with respect to each log-probability, written down by hand."""
    log_ratio = (tokens.logprobs - tokens.old_logprobs).detach()
    ratio, a = log_ratio.exp(), tokens.advantages
    if name == "cispo":
        return -weights * ratio.clamp(0.8, 1.3) * a
    if name in ("gspo", "gspo_token"):
        ratio = ((log_ratio * MASK).sum(1, keepdim=True) / LENGTHS.unsqueeze(1)).exp().expand(4, 5)
    token = -weights * a * ratio * ~clipped(ratio, a)
    if name == "gspo":
        token = (token * MASK).sum(1, keepdim=True) / LENGTHS.unsqueeze(1) * MASK
    if name == "decoupled_ppo":
        token = token * (tokens.old_logprobs - tokens.rollout_logprobs).exp()
    return token


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_gradients_in_closed_form(name: str, aggregation, precision) -> None:
    tokens = example(precision.dtype)
    weights = token_weights(aggregation, MASK, 7, precision.dtype)
    expected = closed_form(name, tokens, weights)
    assert 0 < policy_loss_named(name).compute(tokens, CLIP).clipped[MASK].sum() < MASK.sum()
    torch.testing.assert_close(gradient(name, tokens, weights), expected, atol=precision.tolerance, rtol=0)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_oracle_05_at_ratio_one_the_gradient_is_the_policy_gradient(name: str, precision) -> None:
    tokens = example(precision.dtype, spread=0.0, per_response=True)
    tokens = PolicyTokens(**vars(tokens) | {"rollout_logprobs": tokens.old_logprobs})
    weights = token_weights("sequence_mean", MASK, dtype=precision.dtype)
    result = policy_loss_named(name).compute(tokens, CLIP)
    assert (result.ratio == 1.0).all() and not result.clipped.any()
    expected = -weights * tokens.advantages
    torch.testing.assert_close(gradient(name, tokens, weights), expected, atol=precision.tolerance, rtol=0)


@pytest.mark.parametrize("name", ["gspo", "gspo_token"])
def test_gspo_is_the_mean_over_sequences_of_one_clipped_ratio(name: str, precision) -> None:
    """Term by term, with loops: (1/B) sum_i min(s_i A_i, clip(s_i) A_i), s_i = (pi(y_i) / pi_old(y_i))^(1 / |y_i|)."""
    tokens = example(precision.dtype, spread=1.0, per_response=True)
    terms, holds = [], []
    for row, length in enumerate(LENGTHS.tolist()):
        differences = (tokens.logprobs - tokens.old_logprobs)[row, :length].tolist()
        ratio, a = math.exp(sum(differences)) ** (1 / length), tokens.advantages[row, 0].item()
        terms.append(min(ratio * a, min(max(ratio, 0.8), 1.3) * a))
        holds.append((a > 0 and ratio > 1.3) or (a < 0 and ratio < 0.8))
    assert 0 < sum(holds) < 4
    result = policy_loss_named(name).compute(tokens, CLIP)
    loss = weighted_sum(result.loss, token_weights("sequence_mean", MASK, dtype=precision.dtype)).item()
    assert loss == pytest.approx(-sum(terms) / 4, abs=precision.tolerance)
    assert [row[valid].unique().tolist() for row, valid in zip(result.clipped, MASK, strict=True)] == [
        [h] for h in holds
    ]


def test_gspo_token_is_gspo_where_a_response_has_one_advantage(precision) -> None:
    tokens = example(precision.dtype, per_response=True)
    weights = token_weights("sequence_mean", MASK, dtype=precision.dtype)
    one, other = (gradient(name, tokens, weights) for name in ("gspo", "gspo_token"))
    torch.testing.assert_close(one, other, atol=precision.tolerance, rtol=0)


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize("ratio", [0.01, 0.79, 0.81, 1.0, 1.29, 1.31, 50.0])
def test_cispo_keeps_the_gradient_at_the_bound_where_ppo_drops_it(ratio: float, advantage: float) -> None:
    logprobs = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.bool)
    tokens = PolicyTokens(logprobs, zero, zero, zero + advantage, one, Segments(torch.zeros(1, dtype=torch.int64), 1))
    expected = -advantage * min(max(ratio, 0.8), 1.3)
    assert gradient("cispo", tokens, torch.ones(1)).item() == pytest.approx(expected, abs=1e-12)
    unbounded = gradient("cispo", tokens, torch.ones(1), Clip(1.0, 4.0)).item()
    assert unbounded == pytest.approx(-advantage * min(ratio, 5.0), abs=1e-12), "clip_low 1 is no lower bound"


def test_oracle_12_decoupled_ppo_at_ratio_one_has_the_expected_gradient_of_its_first_token(tabular_policies) -> None:
    """Over enumerated sequences of one token, sampled by another policy: w makes the gradient that of the policy."""
    policy, behaviour, _ = tabular_policies
    current, sampled_by = (torch.log_softmax(p.logits[0], dim=-1) for p in (policy, behaviour))
    advantages, every = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), torch.ones(3, 1, dtype=torch.bool)

    def expected_gradient(name: str, probabilities: Tensor, rollout_logprobs: Tensor) -> Tensor:
        column = current.unsqueeze(1)
        tokens = PolicyTokens(
            column,
            column.detach(),
            rollout_logprobs.unsqueeze(1),
            advantages.unsqueeze(1),
            every,
            Segments.rows(every),
        )
        loss = (probabilities.unsqueeze(1) * policy_loss_named(name).compute(tokens, CLIP).loss).sum()
        return torch.autograd.grad(loss, policy.logits, retain_graph=True)[0]

    on_policy = expected_gradient("ppo", current.exp().detach(), current.detach())
    off_policy = expected_gradient("decoupled_ppo", sampled_by.exp(), sampled_by)
    torch.testing.assert_close(off_policy, on_policy, atol=1e-9, rtol=0)
    assert (expected_gradient("ppo", sampled_by.exp(), sampled_by) - on_policy).abs().max() > 1e-3
