"""Ways to combine an ensemble: their definitions and their purpose."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rlhf_ray.algorithms.reward_quality import combine, disagreement

REWARDS = arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(1, 6)), elements=st.floats(-5, 5))


def test_by_hand():
    rewards = np.asarray([[1.0, 2.0], [3.0, 2.0]])
    assert combine(rewards, "mean").tolist() == [2, 2]
    assert combine(rewards, "min").tolist() == [1, 2]
    assert disagreement(rewards).tolist() == [1, 0]
    assert combine(rewards, "uncertainty", 0.5).tolist() == [1.5, 2]


@given(REWARDS, st.floats(0, 3))
def test_what_is_uncertain_never_counts_more(rewards, penalty):
    mean = combine(rewards, "mean")
    assert (combine(rewards, "min") <= mean + 1e-9).all()
    assert (combine(rewards, "uncertainty", penalty) <= mean + 1e-9).all()
    np.testing.assert_allclose(combine(rewards, "uncertainty", 0.0), mean)


@given(REWARDS, st.floats(-3, 3))
def test_members_that_agree_are_one(rewards, shift):
    same = np.repeat(rewards[:1], 3, axis=0)
    for how in ("mean", "min", "uncertainty"):
        np.testing.assert_allclose(combine(same, how, 2.0), rewards[0], atol=1e-9)
        np.testing.assert_allclose(combine(rewards + shift, how, 1.0), combine(rewards, how, 1.0) + shift, atol=1e-9)


@pytest.mark.parametrize(("how", "wins"), [("mean", "hacked"), ("min", "honest"), ("uncertainty", "honest")])
def test_a_response_that_fools_one_member(how, wins):
    """Four members agree on an honest response; one of them gives a hacked response a high reward."""
    rewards = np.asarray([[1.0, 0.5], [1.1, 0.4], [0.9, 0.6], [1.0, 3.5]])
    honest, hacked = combine(rewards, how, 1.0)
    assert (wins == "honest") == (honest > hacked)
