"""A teacher in the real learners: the result does not depend on ranks, sharding or micro-batches."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from rlhf_ray.algorithms.distillation import reverse_kl
from rlhf_ray.batch import Batch, pad
from rlhf_ray.config.algorithm import AlgorithmConfig, KLConfig
from rlhf_ray.config.learner import LearnerConfig, ShardingConfig
from rlhf_ray.config.teacher import TeacherConfig
from rlhf_ray.learner.objectives import Objective, policy_objective
from rlhf_ray.learner.teacher import FrozenTeacher, load_teacher
from rlhf_ray.models.heads import TargetLogits, TokenLogprobs
from rlhf_ray.models.loading import load_causal_lm
from tests.learner.rank_worker import RankWorker, ragged_batch

# Ray's workers cannot import a test, so its classes are sent with their code.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

ALONE = AlgorithmConfig(advantage="none", kl=KLConfig(placement="none"))
ENV = {"env_vars": {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}}


class TaughtRank(RankWorker):
    """A rank with a teacher."""

    def taught(self, model: str, teacher: str, stage: int, batch: Batch, budget: int, steps: int) -> tuple:
        self.use(ALONE)
        self.config = TeacherConfig(model=teacher, mode="full_vocabulary", coefficient=2.0)
        self.learner = LearnerConfig(sharding=ShardingConfig(zero_stage=stage), packing=stage == 3)
        return self.train(model, stage, batch, budget, steps, packing=self.learner.packing)

    def objective(self) -> Objective:
        return policy_objective(self.algorithm, 0.0, load_teacher(self.config, self.learner, torch.device("cpu")))


@pytest.fixture(scope="module")
def batch() -> Batch:
    batch = ragged_batch(np.random.default_rng(0), 300, [3, 31, 4, 17, 9, 24, 5])
    return batch.with_columns(advantages=np.zeros_like(batch.advantages))


def train(world: int, *arguments) -> list[tuple]:
    actor = ray.remote(TaughtRank).options(num_cpus=0.5, runtime_env=ENV)
    ranks = [actor.remote(rank, world) for rank in range(world)]
    try:
        port = ray.get(ranks[0].free_port.remote())
        ray.get([rank.join.remote(port) for rank in ranks])
        return ray.get([rank.taught.remote(*arguments) for rank in ranks])
    finally:
        for rank in ranks:
            ray.kill(rank)


def test_ranks_and_sharding_change_nothing(ray_cluster, tiny_model, tiny_teacher, batch):
    """Oracle 16: one unsharded rank against two ranks with sharded policy and teacher and other, packed micro-batches."""
    models = (str(tiny_model), str(tiny_teacher))
    ((gradients, parameters, losses, _),) = train(1, *models, 0, batch, 8192, 5)
    assert losses[-1] < 0.9 * losses[0], "it learns"
    (sharded, sharded_parameters, sharded_losses, _), _ = train(2, *models, 3, batch, 40, 5)
    np.testing.assert_allclose(sharded_losses, losses, rtol=1e-5)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(sharded[name], gradient, atol=1e-5)
    for name, parameter in parameters.items():
        np.testing.assert_allclose(sharded_parameters[name], parameter, atol=1e-4)


def loss_and_gradient(model: TokenLogprobs, teacher: FrozenTeacher, batch: Batch) -> tuple[float, torch.Tensor, dict]:
    model.zero_grad()
    loss, diagnostics = policy_objective(ALONE, 0.0, teacher)(model, pad(batch), batch)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    return loss.item(), gradient, diagnostics.metrics()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_loss_is_the_mean_kl_and_oracle_23(tiny_model, tiny_teacher, batch, temperature):
    model = TokenLogprobs(load_causal_lm(tiny_model), temperature)
    teacher = TargetLogits(load_causal_lm(tiny_teacher)).requires_grad_(False)
    loss, gradient, metrics = loss_and_gradient(model, FrozenTeacher(teacher, 3.0), batch)
    padded = pad(batch)
    with torch.no_grad():
        mean = reverse_kl(TargetLogits(model.model)(padded), teacher(padded), temperature).mean().item()
    assert loss == pytest.approx(3 * mean, rel=1e-5) and metrics["teacher/kl"] == pytest.approx(mean, rel=1e-5)
    assert mean > 1e-3 and gradient.norm() > 1e-3
    assert all(p.grad is None for p in teacher.parameters())
    itself = FrozenTeacher(TargetLogits(load_causal_lm(tiny_model)), 3.0)
    loss, gradient, metrics = loss_and_gradient(model, itself, batch)
    assert loss == metrics["teacher/kl"] == 0.0 and gradient.abs().max() == 0.0
