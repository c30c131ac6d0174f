"""Demonstrations in the policy's steps: the same in every attempt, each once per epoch, and separate from the rollouts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.batch import Batch, pack_sequences
from rlhf_ray.config.ppo import PpoConfig
from rlhf_ray.driver.extras.ptx import DemonstrationSource, Ptx, demonstrations_per_step, with_demonstrations


def dialogues(count: int, first: int = 0) -> Batch:
    """Dialogue i has 2 + i % 3 tokens, all of them `first + i`; the first is no target."""
    lengths = [2 + i % 3 for i in range(count)]
    return pack_sequences([np.full(n, first + i) for i, n in enumerate(lengths)], [np.arange(n) > 0 for n in lengths])


def identities(batch: Batch) -> list[int]:
    return batch.token_ids[np.cumsum(batch.lengths) - batch.lengths].tolist()


@given(st.integers(1, 9), st.integers(0, 3), st.lists(st.integers(1, 12), min_size=1, max_size=5))
def test_every_epoch_visits_each_once_however_it_is_cut(size, seed, counts):
    source, taken, start = DemonstrationSource(dialogues(size), seed), [], 0
    for count in counts:
        taken += identities(source.take(start, count))
        start += count
    assert taken == identities(DemonstrationSource(dialogues(size), seed).take(0, start)), (
        "a function of the place alone"
    )
    for epoch in range(start // size):
        assert sorted(taken[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_epochs_and_seeds_differ():
    orders = [
        identities(DemonstrationSource(dialogues(20), seed).take(20 * epoch, 20)) for seed in (0, 1) for epoch in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize(("share", "expected"), [(1.0, 32), (0.25, 8), (2.0, 64), (0.001, 1)])
def test_demonstrations_per_step(share, expected):
    assert demonstrations_per_step(share, 32) == expected


def test_both_in_one_batch():
    rollouts = dialogues(2).with_columns(weights=np.full(3, 1 / 3), advantages=np.asarray([1.0, 2.0, 3.0]))
    mixed = with_demonstrations(rollouts, dialogues(2, first=10), 0.6)
    assert identities(mixed) == [0, 1, 10, 11] and mixed.target_counts.tolist() == [1, 2, 1, 2]
    assert mixed.weights.tolist() == [1 / 3] * 3 + [0.0] * 3
    assert mixed.advantages.tolist() == [1.0, 2.0, 3.0, 0.0, 0.0, 0.0]
    assert mixed.ptx_weights.tolist() == pytest.approx([0.0] * 3 + [0.2] * 3)
    assert mixed.old_logprobs is None and rollouts.ptx_weights is None


def test_the_hook_takes_the_demonstrations_of_its_optimizer_step():
    """Half as many as the 4 rollouts of a minibatch."""
    config = PpoConfig.model_validate(
        {
            "batch_size": 8, "minibatches": 2, "reward": {"model": {"path": "reward"}},
            "algorithm": {"ptx": {"coefficient": 0.6, "share": 0.5}},
        }
    )  # fmt: skip
    hook, rollouts = Ptx(config, DemonstrationSource(dialogues(20), 3)), dialogues(4, first=100)
    extended = [identities(hook.extend_minibatch(rollouts, done)) for done in range(3)]
    assert all(ids[:4] == [100, 101, 102, 103] for ids in extended)
    taken = identities(DemonstrationSource(dialogues(20), 3).take(0, 6))
    assert [number for ids in extended for number in ids[4:]] == taken
