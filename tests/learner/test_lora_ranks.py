"""A learner with adapters on the real engine: ranks, sharding and packing change nothing, and checkpoints hold adapters only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from rlhf_ray.batch import Batch
from rlhf_ray.config.learner import LearnerConfig, LoraConfig, OptimizerConfig, ShardingConfig
from rlhf_ray.learner import deepspeed_engine
from rlhf_ray.learner.sharded_model import ShardedModel
from tests.learner.rank_worker import RankWorker, ragged_batch

LORA = LoraConfig(rank=4, alpha=8.0)
ENV = {"env_vars": {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}}


class LoraRank(RankWorker):
    """A rank whose learner can be closed and restored."""

    def start(self, model: str, stage: int) -> None:
        config = LearnerConfig(
            sharding=ShardingConfig(zero_stage=stage), optimizer=OptimizerConfig(max_grad_norm=1e9), lora=LORA
        )
        self.learner = ShardedModel(
            deepspeed_engine.build(lambda: self.load(model), config), config, self.rank, self.world
        )

    def steps(self, batch: Batch, count: int) -> list[float]:
        """Take steps over all sequences on each rank; returns the losses."""
        everything = [np.arange(len(batch))]
        return [self.learner.step(batch, everything, self.objective(), 1e-3).loss for _ in range(count)]

    def save(self, folder: str) -> None:
        self.learner.save_state(folder, {"steps": 2})

    def restore(self, folder: str) -> int:
        return self.learner.load_state(folder)["steps"]

    def adapters(self) -> dict[str, np.ndarray]:
        return {name: tensor.numpy().copy() for name, tensor in self.learner.named_adapters(1 << 20)}

    def trained_parameters(self) -> int:
        trained = [p for p in self.learner.engine.module.parameters() if p.requires_grad]
        return sum(getattr(p, "ds_numel", p.numel()) for p in trained)


def written_numbers(folder: Path) -> int:
    """The number of elements in the tensors of a checkpoint."""

    def within(state: object) -> int:
        if isinstance(state, torch.Tensor):
            return state.numel()
        parts = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
        return sum(map(within, parts))

    return sum(within(torch.load(path, weights_only=False)) for path in folder.rglob("*.pt"))


@pytest.fixture(scope="module")
def batch(tiny_model):
    return ragged_batch(np.random.default_rng(0), 300, [3, 31, 4, 17, 9, 24, 5])


@pytest.fixture(scope="module")
def world(ray_cluster):
    """A function that starts the given number of ranks."""
    started: dict[int, list] = {}

    def of(size: int) -> list:
        if size not in started:
            actor = ray.remote(LoraRank).options(num_cpus=0, runtime_env=ENV)
            started[size] = [actor.remote(rank, size) for rank in range(size)]
            port = ray.get(started[size][0].free_port.remote())
            ray.get([worker.join.remote(port) for worker in started[size]])
        return started[size]

    yield of
    for worker in (worker for workers in started.values() for worker in workers):
        ray.kill(worker)


def differences(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    assert ours.keys() == theirs.keys() and len(ours) > 5
    return max(float(np.abs(ours[name] - theirs[name]).max()) for name in ours)


@pytest.fixture(scope="module")
def control(world, tiny_model, batch):
    (single,) = world(1)
    return ray.get(single.train.remote(str(tiny_model), 0, batch, 10_000, 5, lora=LORA))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_oracle_16_of_adapters(world, control, tiny_model, batch, stage):
    """Gradients of adapters, merged weights and losses: two packing ranks under every ZeRO stage against one padding rank."""
    calls = [w.train.remote(str(tiny_model), stage, batch, 40, 5, packing=True, lora=LORA) for w in world(2)]
    for gradients, parameters, losses, norms in ray.get(calls):
        assert all("lora" in name for name in gradients)
        assert differences(gradients, control[0]) < 1e-5
        assert differences(parameters, control[1]) < 1e-4
        np.testing.assert_allclose(losses, control[2], atol=1e-5)
        np.testing.assert_allclose(norms, control[3], rtol=1e-4)


def test_it_learns(control):
    gradients, _, losses, _ = control
    assert max(float(np.abs(g).max()) for name, g in gradients.items() if "lora_B" in name) > 1e-3
    assert abs(losses[0] - losses[-1]) > 1e-4


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 2), (2, 3)])
def test_it_resumes_bit_exactly_from_the_adapters_alone(world, tiny_model, batch, tmp_path, ranks, stage):
    """Two steps, a checkpoint, two steps; then the same two steps from the checkpoint on a fresh model."""
    workers = world(ranks)

    def on_all(method: str, *arguments: object) -> list:
        return ray.get([getattr(worker, method).remote(*arguments) for worker in workers])

    on_all("start", str(tiny_model), stage)
    on_all("steps", batch, 2)
    on_all("save", str(tmp_path))
    expected, adapters = on_all("steps", batch, 2), on_all("adapters")[0]
    on_all("start", str(tiny_model), stage)
    assert on_all("restore", str(tmp_path)) == [2] * ranks
    assert on_all("steps", batch, 2) == expected
    again = on_all("adapters")[0]
    assert all((again[name] == adapters[name]).all() for name in adapters)
    trained = sum(array.size for array in adapters.values())
    assert on_all("trained_parameters") == [trained] * ranks
    # The adapters, their fp32 masters under sharding, and Adam's two averages, at most once on each rank.
    assert trained < written_numbers(tmp_path) < ranks * 4 * trained * 1.1


def test_a_missing_checkpoint_is_an_error(world, tiny_model, tmp_path):
    (single,) = world(1)
    ray.get(single.start.remote(str(tiny_model), 0))
    with pytest.raises(RuntimeError, match="found no learner state"):
        ray.get(single.restore.remote(str(tmp_path / "absent")))
