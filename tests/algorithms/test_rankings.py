"""Losses of rankings, against sums over permutations, Bradley-Terry, and by gradients in closed form."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf_ray.algorithms.preferences import (
    MOST_TIED,
    all_pairs,
    bradley_terry_loss,
    choice_loss,
    plackett_luce_loss,
    preference_of_ranks,
)

RANKINGS = st.lists(st.integers(1, 4), min_size=2, max_size=5)


def rewards_of(count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def whole(ranks: list[int]) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(ranks), np.asarray([len(ranks)])


def cost_of_order(rewards: list[float], order: tuple[int, ...]) -> float:
    """The formula, term by term."""
    cost = 0.0
    for place in range(len(order)):
        cost += math.log(sum(math.exp(rewards[i]) for i in order[place:])) - rewards[order[place]]
    return cost


@given(RANKINGS)
def test_plackett_luce_is_the_mean_over_the_orders_that_the_ranks_allow(ranks):
    rewards = rewards_of(len(ranks))
    orders = [o for o in permutations(range(len(ranks))) if [ranks[i] for i in o] == sorted(ranks)]
    expected = np.mean([cost_of_order(rewards.tolist(), order) for order in orders])
    assert plackett_luce_loss(rewards, *whole(ranks)).tolist() == pytest.approx([expected], abs=1e-9)


def test_without_ties_it_is_minus_the_logarithm_of_a_probability():
    rewards = rewards_of(4)
    costs = [plackett_luce_loss(rewards, *whole(list(ranks))).item() for ranks in permutations(range(1, 5))]
    assert sum(math.exp(-cost) for cost in costs) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("ranks", [[1, 2], [2, 1], [1, 1]])
def test_oracle_20_a_ranking_of_two_is_bradley_terry(ranks, precision):
    """The whole order and the choice of the best: values and gradients; ties included."""
    rewards = rewards_of(2, dtype=precision.dtype).requires_grad_()
    q = preference_of_ranks(np.asarray(ranks[:1]), np.asarray(ranks[1:])).item()
    expected = bradley_terry_loss(rewards[:1], rewards[1:], q)
    (gradient,) = torch.autograd.grad(expected.sum(), rewards, retain_graph=True)
    for loss in (plackett_luce_loss, choice_loss):
        ours = loss(rewards, *whole(ranks))
        torch.testing.assert_close(ours, expected, atol=precision.tolerance, rtol=0)
        torch.testing.assert_close(
            *torch.autograd.grad(ours.sum(), rewards), gradient, atol=precision.tolerance, rtol=0
        )


def test_the_gradient_of_plackett_luce_in_closed_form():
    """d loss / d r_i: the sum over the choices in which i takes part of softmax_i, minus 1."""
    rewards = rewards_of(4).requires_grad_()
    ranks = [3, 1, 4, 2]
    (gradient,) = torch.autograd.grad(plackett_luce_loss(rewards, *whole(ranks)).sum(), rewards)
    expected = -torch.ones(4, dtype=torch.float64)
    for rank in ranks:
        remaining = torch.tensor([other >= rank for other in ranks])
        expected += torch.softmax(rewards.detach().masked_fill(~remaining, -torch.inf), dim=0)
    torch.testing.assert_close(gradient, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("loss", [plackett_luce_loss, choice_loss])
@given(ranks=RANKINGS)
def test_gradients_by_finite_differences_and_shifts_change_nothing(loss, ranks):
    rewards = rewards_of(len(ranks)).requires_grad_()
    assert torch.autograd.gradcheck(lambda r: loss(r, *whole(ranks)), rewards)
    torch.testing.assert_close(loss(rewards + 7.0, *whole(ranks)), loss(rewards, *whole(ranks)), atol=1e-9, rtol=0)


@pytest.mark.parametrize("loss", [plackett_luce_loss, choice_loss])
@given(rankings=st.lists(RANKINGS, min_size=1, max_size=5))
def test_elements_of_different_sizes_do_not_touch_each_other(loss, rankings):
    sizes = np.asarray([len(ranking) for ranking in rankings])
    rewards = rewards_of(int(sizes.sum()))
    together = loss(rewards, np.concatenate(rankings), sizes)
    alone = [loss(part, *whole(r)) for part, r in zip(rewards.split(sizes.tolist()), rankings, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-12, rtol=0)


def test_the_choice_of_the_best_is_cross_entropy_over_n_rewards():
    rewards = rewards_of(5)
    expected = torch.nn.functional.cross_entropy(rewards[None], torch.tensor([3]))
    assert choice_loss(rewards, *whole([2, 2, 2, 1, 2])).item() == pytest.approx(expected.item(), abs=1e-12)
    assert choice_loss(rewards, *whole([4, 3, 5, 1, 2])).item() == pytest.approx(expected.item(), abs=1e-12)


@given(st.lists(st.integers(2, 6), min_size=1, max_size=6))
def test_all_pairs_of_each_element_and_no_other(sizes):
    pairs = all_pairs(np.asarray(sizes))
    element = np.repeat(np.arange(len(sizes)), sizes)
    found = sorted(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))
    count = len(element)
    assert found == [(i, j) for i in range(count) for j in range(i + 1, count) if element[i] == element[j]]
    assert (element[pairs.first] == pairs.element).all() and (element[pairs.second] == pairs.element).all()
    totals = np.bincount(pairs.element, pairs.share)
    np.testing.assert_allclose(totals, 1.0, rtol=1e-6)


def test_ranks_as_preferences():
    assert preference_of_ranks(np.asarray([1, 2, 2]), np.asarray([2, 1, 2])).tolist() == [1.0, 0.0, 0.5]


def test_too_many_on_one_place_are_refused():
    ranks = [1] * (MOST_TIED + 1)
    with pytest.raises(ValueError, match=rf"{MOST_TIED + 1} responses share place 1 of a ranking; at most {MOST_TIED}"):
        plackett_luce_loss(rewards_of(len(ranks)), *whole(ranks))


def test_likely_orders_teach_the_rewards_that_they_were_drawn_with():
    """Minimising the expected loss over the true distribution of orders gives back the differences of the rewards."""
    truth = torch.tensor([1.0, 0.0, -0.7], dtype=torch.float64)
    orders = list(permutations(range(3)))
    chances = [math.exp(-cost_of_order(truth.tolist(), order)) for order in orders]
    ranks = np.concatenate([np.argsort(order) + 1 for order in orders])
    rewards = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([rewards], max_iter=200, tolerance_grad=1e-13, tolerance_change=0.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        costs = plackett_luce_loss(rewards.repeat(len(orders)), ranks, np.full(len(orders), 3))
        loss = (torch.tensor(chances, dtype=torch.float64) * costs).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    learned = rewards.detach()
    torch.testing.assert_close(learned - learned.mean(), truth - truth.mean(), atol=1e-7, rtol=0)
