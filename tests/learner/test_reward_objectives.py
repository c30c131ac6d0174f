"""The objectives of a reward model on a table of rewards: what they learn, and that cutting a minibatch changes nothing."""

from __future__ import annotations

import functools
import operator
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rlhf_ray.batch import Batch, ModelInput, pack_sequences, pad
from rlhf_ray.config.supervised import GroupsConfig, ReliabilityConfig, RewardModelConfig
from rlhf_ray.learner.reward_objectives import RewardObjective
from rlhf_ray.micro_batches import plan_micro_batches
from rlhf_ray.models.reward_heads import RewardHeads

ONE = RewardHeads({"reward": 1.0})
NAN = float("nan")


class Table(nn.Module):
    """Rewards [items, rows] by a sequence's last token; float64, to compare with closed forms."""

    def __init__(self, items: int, rows: int, seed: int | None = None) -> None:
        super().__init__()
        start = torch.zeros(items, rows, dtype=torch.float64)
        if seed is not None:
            start.normal_(generator=torch.Generator().manual_seed(seed))
        self.rewards = nn.Parameter(start)

    def forward(self, padded: ModelInput) -> Tensor:
        return self.rewards[padded.input_ids.flatten()[padded.last]]


def batch_of(items: list[list[int]], labels: list[list[list[float]]], weights: list[float] | None = None) -> Batch:
    """One element for each entry: the items and labels of its sequences. The lengths differ."""
    sequences = [np.asarray([0] * (1 + item % 3) + [item]) for element in items for item in element]
    packed = pack_sequences(sequences, [np.arange(len(s)) == len(s) - 1 for s in sequences])
    starts = np.concatenate([np.arange(len(element)) == 0 for element in items])
    weights = np.ones(len(items)) if weights is None else np.asarray(weights)
    return replace(
        packed,
        weights=(np.repeat(weights / weights.sum(), [len(e) for e in items]) * starts).astype(np.float32),
        element_starts=starts,
        labels=np.asarray([row for element in labels for row in element], dtype=np.float32),
    )


def pairs(rows: list[tuple[int, int, float]], group: float = 0, annotator: float = 0, margin: float = 0) -> Batch:
    """(chosen item, rejected item, preference)."""
    labels = [[[group, annotator, q, margin]] * 2 for _, _, q in rows]
    return batch_of([[first, second] for first, second, _ in rows], labels)


def concatenate(*batches: Batch) -> Batch:
    """Join batches; each of them has the same total weight."""
    names = ("token_ids", "lengths", "target_mask", "element_starts", "labels")
    merged = {name: np.concatenate([getattr(b, name) for b in batches]) for name in names}
    return Batch(**merged, weights=np.concatenate([b.weights for b in batches]) / len(batches))


def fit(objective: RewardObjective, model: Table, batch: Batch) -> None:
    optimizer = torch.optim.LBFGS([model.rewards], max_iter=500, tolerance_grad=1e-12, tolerance_change=0.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss, _ = objective(model, pad(batch), batch)
        loss.backward()
        return loss

    optimizer.step(closure)


def all_true_pairs(worth: np.ndarray, group: float) -> Batch:
    """All pairs of items with the true probability as a soft label, like infinitely many labels."""
    rows = [(i, j, 1 / (1 + np.exp(worth[j] - worth[i]))) for i, j in combinations(range(len(worth)), 2)]
    return pairs(rows, group)


WORTH = np.asarray([0.0, 1.0, -0.5, 0.3])
TASTE = np.asarray([0.0, -1.5, 0.5, 1.0])


def learned_of_groups(shrinkage: float) -> tuple[np.ndarray, np.ndarray]:
    """Differences to item 0 of r_0 and of both groups [2, items]; the groups have opposite preferences."""
    config = RewardModelConfig(centring=0.0, groups=GroupsConfig(shrinkage=shrinkage))
    heads = RewardHeads({"reward": 1.0}, ("cooks", "guests"))
    model = Table(4, len(heads))
    batch = concatenate(all_true_pairs(WORTH + TASTE, 1.0), all_true_pairs(WORTH - TASTE, 2.0))
    fit(RewardObjective(config, heads), model, batch)
    table = model.rewards.detach().numpy()
    readings = np.stack([table @ heads.coefficients(reading) for reading in (None, "cooks", "guests")])
    readings -= readings[:, :1]
    return readings[0], readings[1:]


def test_groups_recover_a_planted_difference():
    consensus, groups = learned_of_groups(shrinkage=1e-4)
    np.testing.assert_allclose(groups, [WORTH + TASTE, WORTH - TASTE], atol=1e-2)
    np.testing.assert_allclose(consensus, WORTH, atol=1e-2)


def test_shrinkage_draws_groups_to_the_consensus():
    spreads = []
    for shrinkage in (1e-4, 0.1, 10.0):
        consensus, groups = learned_of_groups(shrinkage)
        spreads.append(np.abs(groups - consensus).max())
    assert spreads[0] > spreads[1] > spreads[2] and spreads[2] < 0.05
    assert spreads[1] > 0.2 * spreads[0]


def test_labels_without_a_group_train_only_the_consensus():
    heads = RewardHeads({"reward": 1.0}, ("cooks",))
    model = Table(3, 2, seed=0)
    batch = pairs([(1, 2, 1.0)])
    loss, _ = RewardObjective(RewardModelConfig(groups=GroupsConfig()), heads)(model, pad(batch), batch)
    loss.backward()
    assert (model.rewards.grad[1:, 0] != 0).all() and (model.rewards.grad[:, 1] == 0).all()


def test_the_first_loss_of_comparisons_is_log_two():
    batch = pairs([(1, 2, 1.0), (0, 1, 0.5), (2, 0, 0.3)])
    loss, diagnostics = RewardObjective(RewardModelConfig(), ONE)(Table(3, 1), pad(batch), batch)
    assert loss.item() == pytest.approx(np.log(2), abs=1e-7)
    assert diagnostics.metrics()["accuracy"] == 0.5


def test_pairs_read_margin_weight_and_centring():
    model = Table(3, 1)
    with torch.no_grad():
        model.rewards[:, 0] = torch.tensor([0.0, 0.7, -0.4])
    labels = [[[0, 0, 1.0, 2.0]] * 2, [[0, 0, 0.0, 0.0]] * 2]
    batch = batch_of([[1, 2], [0, 1]], labels, weights=[3.0, 1.0])
    loss, diagnostics = RewardObjective(RewardModelConfig(margin=0.25), ONE)(model, pad(batch), batch)
    first = np.log1p(np.exp(-(1.1 - 0.5))) + 0.01 * 0.3**2
    second = np.log1p(np.exp(-0.7)) + 0.01 * 0.7**2
    assert loss.item() == pytest.approx(0.75 * first + 0.25 * second, abs=1e-7)
    assert diagnostics.metrics() == pytest.approx({"loss": (first + second) / 2, "accuracy": 1.0, "margin": 0.9})


def test_ties_are_in_the_loss_and_not_in_the_accuracy():
    model = Table(3, 1, seed=1)
    batch = pairs([(1, 2, 0.5)])
    _, diagnostics = RewardObjective(RewardModelConfig(), ONE)(model, pad(batch), batch)
    assert diagnostics.metrics().keys() == {"loss"}


def test_a_ranking_of_two_is_a_pair():
    model = Table(4, 1, seed=2)
    as_pairs = pairs([(1, 2, 1.0), (3, 0, 0.0), (2, 3, 0.5)])
    as_rankings = batch_of([[1, 2], [3, 0], [2, 3]], [[[0, 0, r] for r in ranks] for ranks in ([1, 2], [2, 1], [1, 1])])
    expected, _ = RewardObjective(RewardModelConfig(), ONE)(model, pad(as_pairs), as_pairs)
    for name in ("all_pairs", "plackett_luce", "choice"):
        objective = RewardObjective(RewardModelConfig(kind="rankings", ranking_loss=name), ONE)
        loss, _ = objective(model, pad(as_rankings), as_rankings)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-7)


def test_a_long_ranking_counts_as_much_as_a_short_one():
    """The mean over the pairs of an element, then over elements (InstructGPT)."""
    model = Table(5, 1, seed=3)
    batch = batch_of([[0, 1, 2, 3], [4, 0]], [[[0, 0, r] for r in (2, 1, 3, 3)], [[0, 0, r] for r in (1, 2)]])
    config = RewardModelConfig(kind="rankings", centring=0.0)
    loss, diagnostics = RewardObjective(config, ONE)(model, pad(batch), batch)
    r = model.rewards.detach()[:, 0].numpy()

    def cost(i: int, j: int) -> float:
        return float(np.log1p(np.exp(r[j] - r[i])))

    decided = [cost(1, 0), cost(0, 2), cost(0, 3), cost(1, 2), cost(1, 3)]
    tie = (cost(2, 3) + cost(3, 2)) / 2
    assert loss.item() == pytest.approx(((sum(decided) + tie) / 6 + cost(4, 0)) / 2, abs=1e-6)
    right = [r[1] > r[0], r[0] > r[2], r[0] > r[3], r[1] > r[2], r[1] > r[3], r[4] > r[0]]
    assert diagnostics.metrics()["accuracy"] == pytest.approx(np.mean(right))


def test_scores_are_regressed_and_missing_ratings_are_ignored():
    heads = RewardHeads({"helpful": 0.7, "polite": 0.3})
    model = Table(3, 2, seed=4)
    batch = batch_of([[1], [2]], [[[0, 0, 0.5, NAN]], [[0, 0, -1.0, 2.0]]])
    objective = RewardObjective(RewardModelConfig(kind="scores", aspects=dict(heads.weights)), heads)
    loss, _ = objective(model, pad(batch), batch)
    loss.backward()
    r = model.rewards.detach().numpy()
    expected = ((r[1, 0] - 0.5) ** 2 + ((r[2, 0] + 1) ** 2 + (r[2, 1] - 2) ** 2) / 2) / 2
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert model.rewards.grad[1, 1] == 0 and model.rewards.grad[1, 0] == pytest.approx(r[1, 0] - 0.5, abs=1e-6)


def test_scores_of_groups_have_a_difference_for_each_aspect():
    heads = RewardHeads({"helpful": 1.0, "polite": 1.0}, ("cooks",))
    model = Table(2, 4)
    batch = batch_of([[1], [1]], [[[1, 0, 1.0, 3.0]], [[0, 0, -1.0, 2.0]]])
    config = RewardModelConfig(kind="scores", aspects=dict(heads.weights), groups=GroupsConfig(shrinkage=1e-9))
    fit(RewardObjective(config, heads), model, batch)
    np.testing.assert_allclose(model.rewards.detach()[1], [-1.0, 2.0, 2.0, 1.0], atol=1e-5)


def test_reliability_is_learned_only_from_training():
    """Measuring does not update reliabilities. The annotator who contradicts all others becomes less reliable."""
    config = RewardModelConfig(reliability=ReliabilityConfig(strength=5.0))
    objective = RewardObjective(config, ONE, annotators=2)
    model = Table(2, 1)
    with torch.no_grad():
        model.rewards[1] = 3.0
    batch = concatenate(pairs([(1, 0, 1.0)] * 10, annotator=1), pairs([(1, 0, 0.0)] * 10, annotator=2))
    _, diagnostics = objective(model, pad(batch), batch)
    assert objective.reliabilities.values.tolist() == [0.9, 0.9]
    objective.observe(diagnostics)
    first, second = objective.reliabilities.values
    assert first > 0.95 and second < 0.6
    assert 0 < diagnostics.metrics()["labels_meant"] < 1


RANKS = [[1, 2, 3], [1, 1, 2, 3], [2, 1], [3, 1, 2, 2, 1], [1, 2]]
PROBLEMS = {
    "pairs": (
        RewardModelConfig(groups=GroupsConfig(), reliability=ReliabilityConfig()),
        RewardHeads({"reward": 1.0}, ("cooks", "guests")),
        [[i, (i * 3 + 1) % 8] for i in range(8)],
        [[[i % 3, i % 4, (i % 5) / 4, 0.5 * (i % 2)]] * 2 for i in range(8)],
    ),
    **{
        f"rankings-{name}": (
            RewardModelConfig(kind="rankings", ranking_loss=name),
            ONE,
            [[(i * 3 + j) % 8 for j in range(len(ranks))] for i, ranks in enumerate(RANKS)],
            [[[0, 0, rank] for rank in ranks] for ranks in RANKS],
        )
        for name in ("all_pairs", "plackett_luce", "choice")
    },
    "scores": (
        RewardModelConfig(kind="scores", aspects={"a": 1.0, "b": -1.0}, groups=GroupsConfig()),
        RewardHeads({"a": 1.0, "b": -1.0}, ("cooks",)),
        [[i] for i in range(8)],
        [[[i % 2, 0, i / 4, NAN if i % 3 else 1.0]] for i in range(8)],
    ),
}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("budget", [1, 20, 1000])
def test_oracles_16_to_18_no_cut_of_the_minibatch_changes_loss_gradient_or_metrics(problem, ranks, budget):
    """Ranks, accumulation and padding change nothing, for elements of unequal sizes and weights and every kind of feedback."""
    config, heads, items, labels = PROBLEMS[problem]
    batch = batch_of(items, labels, weights=[1.0 + i for i in range(len(items))])
    objective = RewardObjective(config, heads, annotators=3)
    whole, parts = Table(8, len(heads), seed=5), Table(8, len(heads), seed=5)
    expected, measured = objective(whole, pad(batch), batch)
    expected.backward()

    losses, diagnostics = [], []
    for micro_batches in plan_micro_batches(batch.lengths, ranks, budget, batch.element_sizes):
        for indices in micro_batches:
            if len(indices):
                part = batch.select(indices)
                loss, seen = objective(parts, pad(part), part)
                loss.backward()
                losses.append(loss.item())
                diagnostics.append(seen)
    assert sum(losses) == pytest.approx(expected.item(), abs=1e-9)
    torch.testing.assert_close(parts.rewards.grad, whole.rewards.grad, atol=1e-9, rtol=0)
    assert functools.reduce(operator.add, diagnostics).metrics() == pytest.approx(measured.metrics(), abs=1e-9)
