"""Scoring with real actors: each batch goes to the least loaded one; answers and errors come in order."""

from __future__ import annotations

import asyncio

import pytest
import ray

from rlhf_ray.config.reward import RewardConfig, RewardFunctionSource
from rlhf_ray.config.section import Workers
from rlhf_ray.rewards.answers import RewardError
from rlhf_ray.rewards.workers import RewardWorker, ScoringPool


async def start(functions, tiny_model, count: int) -> ScoringPool:
    source = RewardFunctionSource(name="nan_where_marked", function="misbehaving:nan_where_marked")
    config = RewardConfig(model=None, functions=[source], workers=Workers(threads=1))
    options = {"num_cpus": 0.1, "runtime_env": {"env_vars": {"PYTHONPATH": str(functions), "OMP_NUM_THREADS": "1"}}}
    return await ScoringPool.start(RewardWorker, "score", count, lambda index: options, config, (), str(tiny_model))


def test_two_workers_share_the_work(ray_cluster, functions, tiny_model, rollouts):
    async def scenario() -> None:
        pool = await start(functions, tiny_model, count=2)
        try:
            calls = [asyncio.create_task(pool(rollouts[i::3])) for i in range(3)]
            await asyncio.sleep(0)
            tokens = [sum(len(r.prompt.token_ids) + len(r) for r in rollouts[i::3]) for i in range(3)]
            lighter = 0 if tokens[0] <= tokens[1] else 1
            expected = [tokens[0], tokens[1]]
            expected[lighter] += tokens[2]
            assert pool.outstanding == expected, "the third batch goes to the worker with fewer tokens"
            for i, answers in enumerate(await asyncio.gather(*calls)):
                assert [isinstance(answer, RewardError) for answer in answers] == [
                    rollout.prompt.metadata["score"] < 0 for rollout in rollouts[i::3]
                ]
            assert pool.outstanding == [0, 0]
        finally:
            pool.close()
        with pytest.raises(ray.exceptions.RayActorError):
            await pool(rollouts)
        assert pool.outstanding == [0, 0], "a failed call is not outstanding"

    asyncio.run(scenario())
