"""One real step of every recipe: rollouts of the real engine, the driver's batch preparation and update, DeepSpeed learners."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import ray

from rlhf_ray.batch import pack_sequences
from rlhf_ray.config import RunConfig
from rlhf_ray.config.algorithm import AlgorithmConfig
from rlhf_ray.config.ppo import PpoConfig
from rlhf_ray.config.rollout import RolloutConfig, SamplingConfig
from rlhf_ray.config.section import Workers
from rlhf_ray.driver.extras.ptx import DemonstrationSource, Ptx
from rlhf_ray.driver.loop import PpoLoop
from rlhf_ray.driver.rollouts import PromptSource
from rlhf_ray.driver.run_logger import RunLogger
from rlhf_ray.driver.training_batch import collate
from rlhf_ray.driver.workers import Roles
from rlhf_ray.learner import deepspeed_engine
from rlhf_ray.learner.actor import Learner, LearnerSpec
from rlhf_ray.learner.group import LearnerGroup
from rlhf_ray.learner.sharded_model import ShardedModel
from rlhf_ray.models.loading import load_tokenizer
from rlhf_ray.rollout.pool import RolloutPool
from rlhf_ray.runs.events import EventLog
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.types import Experience, Prompt, Rollout, Score
from tests.recipes import RECIPES, load_recipe

# Ray's workers cannot import a test, so its classes are sent with their code.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

PROMPTS, SAMPLES, LIMIT, VOCABULARY = 4, 4, 48, 300
ENV = {"env_vars": {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}}
SMALL = [
    f"ppo.batch_size={PROMPTS * SAMPLES}", f"ppo.samples_per_prompt={SAMPLES}", "ppo.minibatches=1",
    f"ppo.rollout.sampling.max_new_tokens={LIMIT}", "ppo.policy.optimizer.learning_rate=1e-3",
    "ppo.policy.optimizer.schedule=constant",
]  # fmt: skip
BESIDE = {
    "PPO with dual clip, entropy and k2": [
        "ppo.algorithm.dual_clip=3.0", "ppo.algorithm.entropy_coefficient=0.01",
        "ppo.algorithm.kl={placement: loss, estimator: k2}",
    ],
    "GSPO-token with GAE": [
        "ppo.algorithm={policy_loss: gspo_token, aggregation: sequence_mean, kl: {placement: none}}",
    ],
    "truncated responses left out": ["ppo.algorithm.filter_truncated=true"],
}  # fmt: skip
"""More combinations, as overrides of the recipe PPO."""


class FreshLearner(Learner):
    """A learner that restarts from its model folder in the same process with another algorithm."""

    def restart(self, algorithm: AlgorithmConfig) -> None:
        self.spec = replace(self.spec, algorithm=algorithm)
        wrapped = deepspeed_engine.build(self._load, self.spec.config)
        self.model = ShardedModel(wrapped, self.spec.config, self.rank, self.world_size)


@dataclass(frozen=True)
class Stand:
    """The parts that all steps share."""

    experiences: list[Experience]
    policy: LearnerGroup
    value: LearnerGroup
    model: str


async def sample(model: str) -> list[Rollout]:
    """Responses of the real engine to random prompts."""
    config = RolloutConfig(
        workers=Workers(cpus=0.1), max_concurrent=16, kv_cache_gb=0.05, sampling=SamplingConfig(max_new_tokens=LIMIT)
    )
    pool = RolloutPool(config)
    await pool.start(model, 128, 0, lambda index: {"num_cpus": 0.1})
    generator = np.random.default_rng(0)
    prompts = [Prompt(f"p{i}", generator.integers(3, VOCABULARY, 8, dtype=np.int32), ()) for i in range(PROMPTS)]
    source = PromptSource(prompts, "matrix", 0, SAMPLES)
    try:
        requests = [request for index in range(PROMPTS) for request in source.group(index)]
        rollouts = {rollout.id: rollout async for rollout in pool.generate(requests)}
    finally:
        await pool.close()
    return [rollouts[request.id] for request in requests]


async def start_learner(role: str, model: str) -> LearnerGroup:
    spec = LearnerSpec(role, model, PpoConfig().policy, AlgorithmConfig())
    rank = ray.remote(FreshLearner).options(num_cpus=0, runtime_env=ENV).remote(spec, 0, 1)
    await rank.start.remote(*await rank.rendezvous.remote())
    return LearnerGroup([rank], spec)


async def set_up(model: str) -> Stand:
    rollouts, policy, value = await asyncio.gather(
        sample(model), start_learner("policy", model), start_learner("value", model)
    )
    unscored = [Experience(rollout, Score(0.0, {}), None) for rollout in rollouts]
    reference = np.split(await policy.evaluate(collate(unscored)), np.cumsum([len(r) for r in rollouts])[:-1])
    experiences = [
        Experience(
            rollout, Score(score := float(np.mean(rollout.token_ids < VOCABULARY / 2)), {"low": score}), logprobs
        )
        for rollout, logprobs in zip(rollouts, reference, strict=True)
    ]
    return Stand(experiences, policy, value, model)


@pytest.fixture(scope="module")
def stand(ray_cluster, tiny_model) -> Iterator[Stand]:
    stand = asyncio.run(set_up(str(tiny_model)))
    yield stand
    stand.policy.close()
    stand.value.close()


def demonstrations() -> DemonstrationSource:
    rng = np.random.default_rng(1)
    dialogues = [rng.integers(3, VOCABULARY, 20) for _ in range(6)]
    return DemonstrationSource(pack_sequences(dialogues, [np.arange(20) >= 10 for _ in dialogues]), 0)


async def step(stand: Stand, config: RunConfig, folder: Path) -> tuple[float, dict[str, float]]:
    """(what the step gained of Σ weights·A·logπ, its metrics)."""
    groups = [stand.policy] + ([stand.value] if config.ppo.algorithm.needs_value_model else [])
    await asyncio.gather(*(group.ranks[0].restart.remote(config.ppo.algorithm) for group in groups))
    roles = Roles(None, learners=dict(zip(("policy", "value"), groups, strict=False)))
    tokenizer, run_folder = load_tokenizer(stand.model), RunFolder(folder)
    hooks = [Ptx(config.ppo, demonstrations())] if config.ppo.algorithm.ptx else []
    with EventLog(run_folder.events) as events, RunLogger(run_folder, events, tokenizer, config) as logger:
        loop = PpoLoop(config, roles, None, logger, None, hooks)
        prepared = await loop.prepare(stand.experiences)
        ((policy,), values) = await loop.update(prepared)
    assert len(values) == len(groups) - 1, "a value model is trained if and only if the algorithm has one"
    batch = prepared.batch
    before = np.concatenate([e.reference_logprobs for e in stand.experiences])
    assert np.abs(before - batch.rollout_logprobs).max() < 1e-4, "oracle 24: engine and learner agree"
    trained = np.repeat(prepared.trained, batch.target_counts)
    gain = (batch.advantages * (await stand.policy.evaluate(batch) - before))[trained].mean()
    metrics = policy.diagnostics.metrics() | {"loss": policy.loss, "grad_norm": policy.grad_norm}
    for value in values:
        assert np.isfinite(value.loss) and value.grad_norm > 0
    return gain, metrics


@pytest.mark.parametrize("name", [*RECIPES, *BESIDE])
def test_one_step_of_every_algorithm(stand: Stand, tmp_path: Path, name: str) -> None:
    """Oracle 24 for each recipe: the first ratio is 1, nothing is clipped, and the step increases the objective."""
    changes = ["ppo.algorithm.overlong.buffer_tokens=24"] if name == "DAPO" else BESIDE.get(name, [])
    config = load_recipe(name if name in RECIPES else "PPO", tmp_path, [*SMALL, *changes])
    gain, metrics = asyncio.run(step(stand, config, tmp_path / "run"))
    assert np.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
    assert metrics["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["policy/ratio_max"] == pytest.approx(1.0, abs=1e-4) and metrics["policy/clip_fraction"] == 0
    assert gain > 0
    corrected = config.ppo.algorithm.correction != "none"
    assert ("policy/correction_mean" in metrics) == corrected and ("policy/ptx_loss" in metrics) == ("ptx" in name)
    if corrected:
        assert metrics["policy/correction_mean"] == pytest.approx(1.0, abs=1e-3), (
            "nothing to correct: the engines agree"
        )


def test_the_rollouts_differ_enough_for_the_comparison(stand: Stand) -> None:
    """Without this the steps above would learn nothing and the filters would filter nothing."""
    assert {e.rollout.finish_reason for e in stand.experiences} == {"stop", "length"}
    assert len({len(e.rollout) for e in stand.experiences}) > 2
    assert np.std([e.score.total for e in stand.experiences]) > 0.01
