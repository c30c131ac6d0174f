"""Oracles 16–18 on the real learner: ranks, ZeRO stages, accumulation, padding, packing and batch mates change nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import ray
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_ray.config.algorithm import AlgorithmConfig, KLConfig, PtxConfig
from rlhf_ray.driver.extras.ptx import with_demonstrations
from tests.learner.rank_worker import ALGORITHM, RankWorker, ragged_batch

LENGTHS = [3, 31, 4, 17, 9, 24, 5]
STEPS = 5
ENV = {"env_vars": {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}}


@pytest.fixture(scope="module")
def batch(tiny_model):
    return ragged_batch(np.random.default_rng(0), 300, LENGTHS)


@pytest.fixture(scope="module")
def single(ray_cluster):
    """A rank with world size 1."""
    worker = ray.remote(RankWorker).options(num_cpus=0, runtime_env=ENV).remote(0, 1)
    ray.get(worker.join.remote(ray.get(worker.free_port.remote())))
    yield worker
    ray.kill(worker)


@pytest.fixture(scope="module")
def pair(ray_cluster):
    """Two ranks with world size 2."""
    workers = [ray.remote(RankWorker).options(num_cpus=0, runtime_env=ENV).remote(rank, 2) for rank in range(2)]
    port = ray.get(workers[0].free_port.remote())
    ray.get([worker.join.remote(port) for worker in workers])
    yield workers
    for worker in workers:
        ray.kill(worker)


@pytest.fixture(scope="module")
def control(single, tiny_model, batch):
    """The result of one rank with one micro-batch and no sharding."""
    return ray.get(single.train.remote(str(tiny_model), 0, batch, 10_000, STEPS))


def differences(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    assert ours.keys() == theirs.keys() and len(ours) > 5
    return max(float(np.abs(ours[name] - theirs[name]).max()) for name in ours)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_oracle_16_two_ranks_train_as_one(pair, control, tiny_model, batch, stage):
    """Unequal lengths over two ranks, several micro-batches and every ZeRO stage give the same gradients and parameters."""
    calls = [worker.train.remote(str(tiny_model), stage, batch, 40, STEPS) for worker in pair]
    for gradients, parameters, losses, norms in ray.get(calls):
        assert differences(gradients, control[0]) < 1e-5
        assert differences(parameters, control[1]) < 1e-4
        np.testing.assert_allclose(losses, control[2], atol=1e-5)
        np.testing.assert_allclose(norms, control[3], rtol=1e-4)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_oracle_18_two_packing_ranks_train_as_one_that_pads(pair, control, tiny_model, batch, stage):
    """Packed micro-batches over two ranks under every ZeRO stage against one padded micro-batch on one rank."""
    calls = [worker.train.remote(str(tiny_model), stage, batch, 40, STEPS, packing=True) for worker in pair]
    for gradients, parameters, losses, norms in ray.get(calls):
        assert differences(gradients, control[0]) < 1e-5
        assert differences(parameters, control[1]) < 1e-4
        np.testing.assert_allclose(losses, control[2], atol=1e-5)
        np.testing.assert_allclose(norms, control[3], rtol=1e-4)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(3, 40), min_size=1, max_size=8),
    budget=st.integers(1, 200),
    stage=st.integers(0, 3),
    packing=st.booleans(),
    ranks=st.integers(1, 2),
)
def test_the_update_is_a_function_of_the_global_batch(single, pair, tiny_model, lengths, budget, stage, packing, ranks):
    """Oracles 16 to 18 in any combination: lengths, micro-batch size and number, ranks, ZeRO stage, padding or packing."""
    drawn = ragged_batch(np.random.default_rng(sum(lengths)), 300, lengths)
    expected = ray.get(single.train.remote(str(tiny_model), 0, drawn, 10_000, 1))
    workers = [single] if ranks == 1 else pair
    calls = [worker.train.remote(str(tiny_model), stage, drawn, budget, 1, packing=packing) for worker in workers]
    for gradients, parameters, losses, norms in ray.get(calls):
        assert differences(gradients, expected[0]) < 1e-5
        assert differences(parameters, expected[1]) < 1e-4
        np.testing.assert_allclose(losses, expected[2], atol=1e-5)
        np.testing.assert_allclose(norms, expected[3], rtol=1e-4)


def test_gradients_are_not_trivially_equal(control):
    """The comparison above is meaningful: there is a gradient, and training changed the parameters and the loss."""
    assert max(float(np.abs(g).max()) for g in control[0].values()) > 1e-3
    assert abs(control[2][0] - control[2][-1]) > 1e-3


def test_more_ranks_than_sequences(pair, single, tiny_model):
    """A rank without sequences takes part in every collective operation and contributes nothing."""
    lonely = ragged_batch(np.random.default_rng(1), 300, [12])
    expected = ray.get(single.train.remote(str(tiny_model), 0, lonely, 10_000, 2))
    for gradients, parameters, losses, _ in ray.get(
        [worker.train.remote(str(tiny_model), 3, lonely, 40, 2) for worker in pair]
    ):
        assert differences(gradients, expected[0]) < 1e-5
        assert differences(parameters, expected[1]) < 1e-4
        np.testing.assert_allclose(losses, expected[2], atol=1e-5)


FAMILY = {
    "GSPO, sequence correction, k2": AlgorithmConfig(
        advantage="grpo", policy_loss="gspo", aggregation="sequence_mean", correction="truncate",
        correction_level="sequence", kl=KLConfig(placement="loss", estimator="k2"),
    ),
    "CISPO, token mask, entropy": AlgorithmConfig(
        policy_loss="cispo", correction="mask", entropy_coefficient=0.05, kl=KLConfig(placement="none")
    ),
    "decoupled PPO, weighted k1": AlgorithmConfig(
        policy_loss="decoupled_ppo", dual_clip=2.0, kl=KLConfig(placement="loss", estimator="k1", importance_weighted=True)
    ),
    "GSPO-token, demonstrations": AlgorithmConfig(policy_loss="gspo_token", aggregation="sequence_mean", ptx=PtxConfig()),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILY)
def test_oracle_16_of_the_whole_family(pair, single, tiny_model, batch, name):
    """Every kind of loss: two ranks, ZeRO 2 and several micro-batches against one rank, no sharding and one micro-batch."""
    rng, count = np.random.default_rng(3), int(batch.target_mask.sum())
    old, engine = (-np.log(300) + rng.normal(scale=0.3, size=(2, count))).astype(np.float32)
    columns = batch.with_columns(old_logprobs=old, rollout_logprobs=engine)
    if FAMILY[name].ptx:
        columns = with_demonstrations(columns, ragged_batch(rng, 300, [6, 20, 11]), 0.5)
    ray.get([worker.use.remote(FAMILY[name]) for worker in (single, *pair)])
    try:
        expected = ray.get(single.train.remote(str(tiny_model), 0, columns, 10_000, 3))
        results = ray.get([worker.train.remote(str(tiny_model), 2, columns, 40, 3) for worker in pair])
    finally:
        ray.get([worker.use.remote(ALGORITHM) for worker in (single, *pair)])
    assert max(float(np.abs(g).max()) for g in expected[0].values()) > 1e-3
    for gradients, parameters, losses, _ in results:
        assert differences(gradients, expected[0]) < 1e-5
        assert differences(parameters, expected[1]) < 1e-4
        np.testing.assert_allclose(losses, expected[2], atol=1e-5)


def test_oracle_17_accumulation(single, control, tiny_model, batch):
    """One sequence per micro-batch gives the same as all in one micro-batch."""
    gradients, parameters, losses, norms = ray.get(single.train.remote(str(tiny_model), 0, batch, 1, STEPS))
    assert differences(gradients, control[0]) < 1e-5
    assert differences(parameters, control[1]) < 1e-4
    np.testing.assert_allclose(norms, control[3], rtol=1e-4)


def test_oracle_18_batch_mates_and_padding(single, tiny_model):
    """A much longer sequence of weight zero pads all others and changes nothing."""
    rng = np.random.default_rng(2)
    short = ragged_batch(rng, 300, [5, 9, 7])
    with_mate = ragged_batch(np.random.default_rng(2), 300, [5, 9, 7, 60])
    count = int(short.target_mask.sum())
    columns = {}
    for name in ("weights", "advantages", "reference_logprobs"):
        columns[name] = np.concatenate([getattr(short, name), np.zeros(58, dtype=np.float32)])
    with_mate = with_mate.select([0, 1, 2, 3]).with_columns(**columns)
    assert (with_mate.token_ids[: len(short.token_ids)] == short.token_ids).all() and count == 15
    ours = ray.get(single.train.remote(str(tiny_model), 0, with_mate, 10_000, 3))
    alone = ray.get(single.train.remote(str(tiny_model), 0, short, 10_000, 3))
    assert differences(ours[0], alone[0]) < 1e-5
    assert differences(ours[1], alone[1]) < 1e-4
