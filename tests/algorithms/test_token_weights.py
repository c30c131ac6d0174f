"""Weights of tokens: aggregation over a minibatch, and importance weights."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_ray.algorithms.losses import ppo_policy_loss
from rlhf_ray.algorithms.statistics import Segments
from rlhf_ray.algorithms.token_weights import importance_weights, token_weights, weighted_sum


def test_oracle_12_sequence_weights_make_the_off_policy_gradient_on_policy(tabular_policies) -> None:
    """Enumerated over all sequences, with the behaviour's probabilities instead of the policy's."""
    policy, behaviour, _ = tabular_policies
    advantages = torch.linspace(-2, 3, 7, dtype=torch.float64).unsqueeze(1).expand(7, 2)
    logprobs, mask = policy.logprobs(), policy.mask

    def gradient(sampled_by, weights=None) -> torch.Tensor:
        result = ppo_policy_loss(logprobs, logprobs.detach(), advantages, mask)
        result = result if weights is None else result.weighted(weights)
        expected_loss = (sampled_by.probabilities().detach() * result.loss.sum(dim=1)).sum()
        return torch.autograd.grad(expected_loss, policy.logits, retain_graph=True)[0]

    def weights(level) -> torch.Tensor:
        return importance_weights(logprobs, behaviour.logprobs(), mask, level=level, upper=math.inf)

    on_policy = gradient(policy)
    torch.testing.assert_close(gradient(behaviour, weights("sequence")), on_policy, atol=1e-9, rtol=0)
    assert (gradient(behaviour, weights("token")) - on_policy).abs().max() > 1e-3, "token weights are biased"
    assert (gradient(behaviour) - on_policy).abs().max() > 1e-3, "without weights it is another gradient"


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("bound", ["truncate", "mask"])
def test_oracle_12_weights_are_one_where_the_engines_agree(level, bound) -> None:
    logprobs = -torch.rand(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mask = torch.arange(4) < torch.tensor([4, 2, 0]).unsqueeze(1)
    weights = importance_weights(logprobs, logprobs, mask, level=level, bound=bound)
    assert torch.equal(weights, mask.float())
    assert not weights.requires_grad


RATIOS = torch.tensor([[0.25, 1.5], [4.0, 1.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("level", "bound", "lower", "expected"),
    [
        ("token", "truncate", 0.0, [[0.25, 1.5], [2.0, 1.0]]),
        ("token", "mask", 0.5, [[0.0, 1.5], [0.0, 1.0]]),
        ("sequence", "truncate", 0.0, [[0.375, 0.375], [2.0, 2.0]]),
        ("sequence", "mask", 0.3, [[0.375, 0.375], [0.0, 0.0]]),
    ],
)
def test_truncation_and_masking_at_both_levels(level, bound, lower: float, expected) -> None:
    behaviour = torch.full_like(RATIOS, -3.0)
    weights = importance_weights(
        RATIOS.log() - 3.0, behaviour, torch.ones(2, 2), level=level, bound=bound, upper=2.0, lower=lower
    )
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64))


def test_packed_sequences_have_the_weights_of_padded_ones() -> None:
    generator = torch.Generator().manual_seed(1)
    proximal, behaviour = -torch.rand(2, 3, 4, generator=generator, dtype=torch.float64)
    mask = torch.arange(4) < torch.tensor([4, 1, 3]).unsqueeze(1)
    padded = importance_weights(proximal, behaviour, mask, level="sequence", upper=math.inf)
    packed = importance_weights(
        proximal[mask], behaviour[mask], torch.ones(8), level="sequence", upper=math.inf,
        segments=Segments.packed(torch.tensor([4, 1, 3])),
    )  # fmt: skip
    torch.testing.assert_close(packed, padded[mask], atol=1e-12, rtol=0)


def test_a_sequence_weight_ignores_masked_tokens_and_overflow_is_bounded() -> None:
    proximal = torch.tensor([[0.0, math.nan], [500.0, 0.0]])
    behaviour = torch.tensor([[0.0, -math.inf], [-500.0, 0.0]])
    mask = torch.tensor([[1, 0], [1, 1]])
    assert importance_weights(proximal, behaviour, mask, level="sequence").tolist() == [[1.0, 0.0], [2.0, 2.0]]
    assert importance_weights(proximal, behaviour, mask, bound="mask").tolist() == [[1.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"upper": 0.5}, "must satisfy"),
        ({"bound": "mask", "lower": 1.5}, "must satisfy"),
        ({"lower": 0.5}, "no effect"),
        ({"level": "batch"}, "allowed: token, sequence"),
        ({"bound": "clip"}, "allowed: truncate, mask"),
    ],
)
def test_bad_settings_are_named(settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        importance_weights(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1), **settings)


MASK = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 1], [0, 0, 0, 0]])


@pytest.mark.parametrize(
    ("aggregation", "per_row"),
    [("token_mean", [1 / 4, 1 / 4]), ("sequence_mean", [1 / 2, 1 / 6]), ("constant", [1 / 20, 1 / 20])],
)
def test_weights_by_definition_and_empty_rows_change_nothing(aggregation, per_row: list[float]) -> None:
    weights = token_weights(aggregation, MASK, 10, torch.float64)
    expected = MASK * torch.tensor([*per_row, 0.0], dtype=torch.float64).unsqueeze(1)
    torch.testing.assert_close(weights, expected, atol=1e-15, rtol=0)
    torch.testing.assert_close(token_weights(aggregation, MASK[:2], 10, torch.float64), weights[:2], atol=0, rtol=0)


def test_oracle_16_tokens_one_and_two_three_four_average_to_two_and_a_half() -> None:
    """The mean over tokens is 2.5; a mean of the two micro-batches' means would be 2.0."""
    losses = torch.tensor([[1.0, 0.0, 0.0], [2.0, 3.0, 4.0]])
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    weights = token_weights("token_mean", mask)
    parts = [weighted_sum(losses[row], weights[row]).item() for row in range(2)]
    assert sum(parts) == 2.5
    assert weighted_sum(losses, weights).item() == 2.5


def test_bad_aggregations_are_named() -> None:
    with pytest.raises(ValueError, match="allowed: token_mean, sequence_mean, constant"):
        token_weights("mean", MASK)
    with pytest.raises(ValueError, match="max_length >= 1"):
        token_weights("constant", MASK)
    with pytest.raises(ValueError, match="without a valid token"):
        token_weights("token_mean", torch.zeros(2, 3))
