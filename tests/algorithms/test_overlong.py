from __future__ import annotations

import pytest
import torch

from rlhf_ray.algorithms.rewards import soft_overlong_punishment


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
