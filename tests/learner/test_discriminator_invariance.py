"""Oracles 16 to 18 for the discriminator on the real learner: ranks, ZeRO stages, micro-batches and packing change nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import ray

from rlhf_ray.batch import Batch
from rlhf_ray.driver.extras.discriminator import labeled_batch, scored_at_end
from tests.learner.rank_worker import DiscriminatorRankWorker

ENV = {"env_vars": {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}}
STEPS = 3


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Four demonstrations and seven samples of 3 to 40 tokens."""
    rng = np.random.default_rng(0)

    def side(count: int) -> Batch:
        lengths = rng.integers(3, 41, size=count)
        return scored_at_end(rng.integers(3, 300, size=lengths.sum()).astype(np.int32), lengths)

    return labeled_batch(side(4), side(7))


@pytest.fixture(scope="module")
def workers(ray_cluster):
    """One rank of world size 1, and two of world size 2."""
    started = [
        ray.remote(DiscriminatorRankWorker).options(num_cpus=0, runtime_env=ENV).remote(rank, world)
        for rank, world in ((0, 1), (0, 2), (1, 2))
    ]
    ports = ray.get([worker.free_port.remote() for worker in started[:2]])
    ray.get([worker.join.remote(port) for worker, port in zip(started, (ports[0], ports[1], ports[1]), strict=True)])
    yield started
    for worker in started:
        ray.kill(worker)


@pytest.fixture(scope="module")
def control(workers, tiny_model, batch):
    """The result of one rank with one padded micro-batch and no sharding."""
    return ray.get(workers[0].train.remote(str(tiny_model), 0, batch, 10_000, STEPS))


def assert_same(result, control) -> None:
    for ours, theirs, bound in zip(result[:2], control[:2], (1e-5, 1e-4), strict=True):
        assert ours.keys() == theirs.keys() and len(ours) > 5
        assert max(float(np.abs(ours[name] - theirs[name]).max()) for name in ours) < bound
    np.testing.assert_allclose(result[2], control[2], atol=1e-5)


@pytest.mark.parametrize(("stage", "packing"), [(0, True), (2, False), (3, True)])
def test_oracles_16_and_18_two_ranks_train_as_one(workers, control, tiny_model, batch, stage, packing):
    calls = [worker.train.remote(str(tiny_model), stage, batch, 60, STEPS, packing=packing) for worker in workers[1:]]
    for result in ray.get(calls):
        assert_same(result, control)


def test_oracle_17_accumulation(workers, control, tiny_model, batch):
    """One sequence per micro-batch, which has demonstrations or samples but not both."""
    assert_same(ray.get(workers[0].train.remote(str(tiny_model), 0, batch, 1, STEPS)), control)


def test_more_ranks_than_a_side_has_sequences(workers, tiny_model, batch):
    """One rank has a demonstration and the other a sample."""
    few = labeled_batch(
        *(scored_at_end(part.token_ids, part.lengths) for part in (batch.select([0]), batch.select([4])))
    )
    expected = ray.get(workers[0].train.remote(str(tiny_model), 0, few, 10_000, STEPS))
    for result in ray.get([worker.train.remote(str(tiny_model), 3, few, 10_000, STEPS) for worker in workers[1:]]):
        assert_same(result, expected)


def test_the_comparison_means_something(control):
    """The loss starts at log 2 for both sides, and the discriminator learns with its backbone."""
    assert control[2][0] == pytest.approx(np.log(2), abs=0.01) and control[2][-1] < control[2][0] - 0.01
    assert sum(float(np.abs(g).max()) > 1e-5 for g in control[0].values()) > 5
