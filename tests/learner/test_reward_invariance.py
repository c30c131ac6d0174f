"""Oracles 16 and 17 for reward models on the real learner: rankings of unequal sizes, over ranks and ZeRO stages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray

from rlhf_ray.batch import Batch, pack_sequences
from rlhf_ray.config.supervised import GroupsConfig, RewardModelConfig
from tests.learner.rank_worker import RewardRankWorker

ENV = {"env_vars": {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}}
CONFIG = RewardModelConfig(kind="rankings", ranking_loss="plackett_luce", groups=GroupsConfig(shrinkage=0.5))
RANKS = [[1, 2, 3], [2, 1], [1, 1, 2, 3], [3, 2, 1], [1, 2]]
STEPS = 3


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Five rankings by three groups (one of them has no δ), with different weights; sequences of 3 to 40 tokens."""
    rng = np.random.default_rng(0)
    sizes = np.asarray([len(ranks) for ranks in RANKS])
    sequences = [rng.integers(3, 300, size=rng.integers(3, 40)) for _ in range(sizes.sum())]
    starts = np.concatenate([np.arange(size) == 0 for size in sizes])
    weights = np.repeat([0.1, 0.2, 0.3, 0.3, 0.1], sizes) * starts
    labels = [[number % 3, 0, rank] for number, ranks in enumerate(RANKS) for rank in ranks]
    packed = pack_sequences(sequences, [np.arange(len(s)) == len(s) - 1 for s in sequences])
    return replace(
        packed,
        weights=weights.astype(np.float32),
        element_starts=starts,
        labels=np.asarray(labels, dtype=np.float32),
    )


@pytest.fixture(scope="module")
def workers(ray_cluster):
    """One rank of world size 1, and two of world size 2."""
    started = [
        ray.remote(RewardRankWorker).options(num_cpus=0, runtime_env=ENV).remote(rank, world, CONFIG)
        for rank, world in ((0, 1), (0, 2), (1, 2))
    ]
    ports = ray.get([worker.free_port.remote() for worker in started[:2]])
    ray.get([worker.join.remote(port) for worker, port in zip(started, (ports[0], ports[1], ports[1]), strict=True)])
    yield started
    for worker in started:
        ray.kill(worker)


@pytest.fixture(scope="module")
def control(workers, tiny_model, batch):
    return ray.get(workers[0].train.remote(str(tiny_model), 0, batch, 10_000, STEPS))


def differences(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    assert ours.keys() == theirs.keys() and len(ours) > 5
    return max(float(np.abs(ours[name] - theirs[name]).max()) for name in ours)


@pytest.mark.parametrize("stage", [0, 3])
def test_oracle_16_two_ranks_train_as_one(workers, control, tiny_model, batch, stage):
    calls = [worker.train.remote(str(tiny_model), stage, batch, 60, STEPS) for worker in workers[1:]]
    for gradients, parameters, losses, _ in ray.get(calls):
        assert differences(gradients, control[0]) < 1e-5
        assert differences(parameters, control[1]) < 1e-4
        np.testing.assert_allclose(losses, control[2], atol=1e-5)


def test_oracle_17_accumulation(workers, control, tiny_model, batch):
    """One ranking per micro-batch changes nothing."""
    gradients, parameters, _, _ = ray.get(workers[0].train.remote(str(tiny_model), 0, batch, 1, STEPS))
    assert differences(gradients, control[0]) < 1e-5
    assert differences(parameters, control[1]) < 1e-4


def test_gradients_are_not_trivially_equal(control):
    """Every row of the head has a gradient, and so has the backbone."""
    head = next(g for name, g in control[0].items() if name.endswith("score.weight"))
    assert head.shape[0] == 3 and (np.abs(head).max(axis=1) > 1e-3).all()
    assert sum(float(np.abs(g).max()) > 1e-4 for g in control[0].values()) > 5
