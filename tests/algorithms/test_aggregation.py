from __future__ import annotations

import pytest
import torch

from rlhf_ray.algorithms.token_weights import token_weights, weighted_sum

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
