"""Rewards of tokens, and what truncated and long responses lose."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_ray.algorithms.kl import k1, k2, k3, sequence_kl
from rlhf_ray.algorithms.rewards import score_unfinished, soft_overlong_punishment, token_rewards

MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)


def test_score_is_on_the_last_valid_token_and_kl_on_every_valid_one() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, -3.0, math.nan]] * 3)
    reference = torch.tensor([[-1.5, -2.0, -1.0, -math.inf]] * 3)
    rewards = token_rewards(torch.tensor([10.0, 20.0, 30.0]), logprobs, reference, MASK, beta=0.5)
    expected = torch.tensor([[-0.25, 0.0, 11.0, 0.0], [-0.25, 0.0, 21.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(rewards, expected)


def test_rewards_of_a_row_sum_to_the_sequence_reward() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, generator=generator, dtype=torch.float64)
    logprobs, reference = -torch.rand(2, 2, 4, generator=generator, dtype=torch.float64)
    rewards = token_rewards(scores, logprobs, reference, MASK[:2], beta=0.3)
    expected = scores - 0.3 * sequence_kl(logprobs, reference, MASK[:2])
    torch.testing.assert_close(rewards.sum(dim=1), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("estimator", [k1, k2, k3])
def test_any_estimator_can_be_the_penalty(estimator) -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs, reference = -torch.rand(2, 3, 4, generator=generator, dtype=torch.float64)
    rewards = token_rewards(torch.zeros(3), logprobs, reference, MASK, 0.3, estimator.__name__)
    torch.testing.assert_close(rewards, -0.3 * estimator(logprobs, reference, MASK), atol=1e-12, rtol=0)


def test_no_reference_is_needed_without_a_penalty_and_is_demanded_with_one() -> None:
    scores, logprobs = torch.tensor([1.0, 2.0, 3.0]), torch.full((3, 4), -1.0)
    rewards = token_rewards(scores, logprobs, None, MASK, beta=0.0)
    assert rewards.tolist() == [[0, 0, 1, 0], [0, 0, 2, 0], [0, 0, 0, 0]]
    with pytest.raises(ValueError, match="reference_logprobs"):
        token_rewards(scores, logprobs, None, MASK, beta=0.1)


def test_response_of_one_token_gets_everything_there() -> None:
    rewards = token_rewards(torch.tensor([2.0]), torch.tensor([[-1.0]]), torch.tensor([[-3.0]]), torch.ones(1, 1), 0.5)
    assert rewards.tolist() == [[1.0]]


def test_scores_of_unfinished_responses_are_lowered() -> None:
    scores, finished = torch.tensor([1.0, 2.0]), torch.tensor([True, False])
    assert score_unfinished(scores, finished, penalty=0.0).tolist() == [1.0, 2.0]
    assert score_unfinished(scores, finished, penalty=1.5).tolist() == [1.0, 0.5]
    with pytest.raises(ValueError, match="would reward"):
        score_unfinished(scores, finished, penalty=-1.0)


def by_the_paper(length: int, limit: int, cache: int) -> float:
    """The three cases of DAPO's equation."""
    if length <= limit - cache:
        return 0.0
    return ((limit - cache) - length) / cache if length <= limit else -1.0


@pytest.mark.parametrize(("limit", "cache"), [(20, 4), (20, 20), (20, 1)])
@pytest.mark.parametrize("penalty", [1.0, 0.5])
def test_the_three_cases(limit: int, cache: int, penalty: float) -> None:
    lengths = torch.arange(0, 25)
    expected = [penalty * by_the_paper(length, limit, cache) for length in range(25)]
    actual = soft_overlong_punishment(lengths, limit, cache, penalty)
    assert actual.tolist() == pytest.approx(expected)
    assert actual.min() == -penalty and actual.max() == 0


@pytest.mark.parametrize(
    ("cache", "penalty", "message"), [(0, 1.0, "buffer=0"), (21, 1.0, "buffer=21"), (4, -1.0, "reward")]
)
def test_bad_settings_are_named(cache: int, penalty: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        soft_overlong_punishment(torch.tensor([3]), 20, cache, penalty)
