"""Online EM of annotators' reliability: Bayes' rule, exact sums, and recovery of the true values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rlhf_ray.algorithms.preferences import bradley_terry_loss
from rlhf_ray.algorithms.reliability import MeantLabels, Reliabilities, count_meant, probability_meant

FP64 = {"dtype": torch.float64}


def test_the_e_step_is_bayes_rule():
    difference, eta = torch.tensor([0.8, -1.5], **FP64), torch.tensor([0.9, 0.7], **FP64)
    sigmoid = torch.sigmoid(difference)
    expected = eta * sigmoid / (eta * sigmoid + (1 - eta) * (1 - sigmoid))
    torch.testing.assert_close(probability_meant(difference, torch.ones(2, **FP64), eta), expected, atol=1e-12, rtol=0)
    of_the_other = probability_meant(-difference, torch.zeros(2, **FP64), eta)
    torch.testing.assert_close(of_the_other, expected, atol=1e-12, rtol=0)


def test_rewards_that_say_nothing_leave_the_prior():
    state = Reliabilities.start(2, prior=0.9, strength=10.0, memory=100.0)
    eta = torch.from_numpy(state.values)
    meant = probability_meant(torch.zeros(2, **FP64), torch.ones(2, **FP64), eta)
    after = state.after(count_meant(meant, torch.tensor([0, 1]), torch.ones(2, **FP64), 2))
    assert after.values.tolist() == pytest.approx([0.9, 0.9], abs=1e-12)


def test_sums_do_not_depend_on_the_split():
    generator = torch.Generator().manual_seed(0)
    meant = torch.rand(40, generator=generator, **FP64)
    annotator = torch.randint(0, 3, (40,), generator=generator)
    clarity = torch.rand(40, generator=generator, **FP64)
    everything = count_meant(meant, annotator, clarity, 3)
    parts = [
        count_meant(m, a, c, 3) for m, a, c in zip(meant.split(7), annotator.split(7), clarity.split(7), strict=True)
    ]
    added = sum(parts[1:], parts[0])
    torch.testing.assert_close(added.meant, everything.meant, atol=1e-12, rtol=0)
    torch.testing.assert_close(added.labels, everything.labels, atol=1e-12, rtol=0)


def test_a_tie_says_nothing_of_its_annotator():
    counted = count_meant(torch.tensor([0.2], **FP64), torch.tensor([0]), torch.zeros(1, **FP64), 1)
    assert Reliabilities.start(1, 0.8, 10.0, 100.0).after(counted).values.tolist() == [0.8]


def test_memory_fades_with_the_annotators_own_labels():
    state = Reliabilities.start(2, prior=0.9, strength=1e-9, memory=50.0)
    right = MeantLabels(torch.tensor([100.0, 0.0], **FP64), torch.tensor([100.0, 0.0], **FP64))
    wrong = MeantLabels(torch.tensor([0.0, 0.0], **FP64), torch.tensor([50.0, 0.0], **FP64))
    state = state.after(right).after(wrong)
    assert state.values[0] == pytest.approx(100 * math.exp(-1) / (100 * math.exp(-1) + 50))
    assert state.values[1] == pytest.approx(0.9), "nothing was seen of the second"


def test_em_recovers_planted_annotators_and_the_rewards():
    """Three annotators of 60 items: two mean 97 and 85 % of their labels, one only 60 %. The fit does not know which."""
    rng = np.random.default_rng(0)
    planted = np.asarray([0.97, 0.85, 0.60])
    worth = torch.from_numpy(rng.normal(scale=2.0, size=60))
    first, second = torch.from_numpy(rng.integers(0, 60, (2, 9000)))
    annotator = torch.from_numpy(rng.integers(0, 3, 9000))
    meant = torch.from_numpy(rng.random(9000)) < torch.from_numpy(planted)[annotator]
    better = torch.from_numpy(rng.random(9000)) < torch.sigmoid(worth[first] - worth[second])
    preference = (better == meant).double()

    rewards = torch.zeros(60, **FP64, requires_grad=True)
    optimizer = torch.optim.Adam([rewards], lr=0.05)
    state = Reliabilities.start(3, prior=0.9, strength=20.0, memory=2000.0)
    for step in range(450):
        chosen = torch.arange(9000)[step % 15 :: 15]
        who, q = annotator[chosen], preference[chosen]
        eta, difference = torch.from_numpy(state.values)[who], rewards[first[chosen]] - rewards[second[chosen]]
        optimizer.zero_grad()
        bradley_terry_loss(difference, torch.zeros_like(difference), q, reliability=eta).mean().backward()
        optimizer.step()
        probability = probability_meant(difference.detach(), q, eta)
        state = state.after(count_meant(probability, who, torch.ones_like(q), 3))

    np.testing.assert_allclose(state.values, planted, atol=0.04)
    correlation = np.corrcoef(rewards.detach(), worth)[0, 1]
    assert correlation > 0.97
