"""Win rates and their intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.algorithms.statistics import wilson, win_rate

NAN = math.nan


def test_win_rate():
    assert win_rate(np.asarray([1.0, 2.0, 3.0, 4.0]), np.asarray([0.0, 3.0, 3.0, 1.0])).value == (1 + 0 + 0.5 + 1) / 4
    assert win_rate(np.asarray([1.0, NAN, 3.0]), np.asarray([0.0, 1.0, NAN])).value == 1.0, (
        "only the first pair is known"
    )
    assert win_rate(np.asarray([NAN]), np.asarray([1.0])) is None


@pytest.mark.parametrize(
    ("wins", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_of_published_examples(wins, count, low, high):
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3; to four digits."""
    assert (wilson(wins, count).low, wilson(wins, count).high) == pytest.approx((low, high), abs=1e-4)


@given(st.integers(1, 500), st.data())
def test_wilson_interval_holds_the_rate(count, data):
    share = wilson(data.draw(st.integers(0, count)), count)
    rate, low, high = share.value, share.low, share.high
    assert 0 <= low <= rate + 1e-12 and rate - 1e-12 <= high <= 1
    # Its ends are the proportions from which the rate is 1.96 standard errors away.
    for end in (low, high):
        if 1e-9 < end < 1 - 1e-9:
            assert abs(rate - end) / math.sqrt(end * (1 - end) / count) == pytest.approx(1.959964, rel=1e-3)
