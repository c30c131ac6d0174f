"""A worker is killed while it generates: every request is still answered exactly once, with the same tokens."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import pytest
import ray
import torch

from rlhf_ray.config.rollout import SamplingConfig
from rlhf_ray.rollout.requests import EngineFailed, NoWorkerLeft
from rlhf_ray.rollout.worker import RolloutWorker
from rlhf_ray.rollout.workers import State
from rlhf_ray.types import Rollout, RolloutRequest

if TYPE_CHECKING:
    from conftest import LearnerRanks, RunningPool

# Ray's workers cannot import a test module, so its functions are pickled with their code.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

Requests = Callable[..., list[RolloutRequest]]
_LONG = SamplingConfig(max_new_tokens=100)


@pytest.fixture(scope="module")
def two_workers(start: Callable[[int], RunningPool]) -> Iterator[RunningPool]:
    running = start(2)
    yield running
    asyncio.run(running.pool.close())


def test_a_killed_workers_requests_are_answered_by_the_other(
    two_workers: RunningPool, requests_for: Requests, learner: LearnerRanks
) -> None:
    requests = requests_for(64)
    control = two_workers.generate(requests, _LONG)
    first, second = two_workers.pool.workers
    seen_loads = []

    async def generate_and_kill() -> list[Rollout]:
        rollouts = []
        async for rollout in two_workers.pool.generate(requests, _LONG):
            if not rollouts:
                seen_loads.extend([first.load, second.load])
                os.kill(second.info.pid, signal.SIGKILL)
            rollouts.append(rollout)
        return rollouts

    rollouts = asyncio.run(generate_and_kill())
    assert min(seen_loads) > 0, "the killed worker had nothing to lose"
    assert sorted(r.id for r in rollouts) == sorted(request.id for request in requests)
    for rollout in rollouts:
        assert np.array_equal(rollout.token_ids, control[rollout.id].token_ids)
        assert np.array_equal(rollout.logprobs, control[rollout.id].logprobs)
    assert (first.state, second.state) == (State.READY, State.DEAD)
    died, redispatched = two_workers.events[-2:]
    assert (died.kind, died.worker, redispatched.kind) == ("died", "rollout-1", "redispatched")
    assert 0 < len(redispatched.requests) <= seen_loads[1]
    # The pool goes on with the other worker, also with weight updates.
    assert two_workers.sync_weights(1, learner) == ["rollout-0"]


def test_an_engine_that_fails_in_a_living_process_is_a_dead_worker(
    two_workers: RunningPool, requests_for: Requests
) -> None:
    """If no worker is left, the error names the state of each."""
    [survivor] = [member for member in two_workers.pool.workers if member.state is State.READY]
    ray.get(survivor.actor.__ray_call__.remote(_spoil_a_layer))
    assert ray.get(survivor.actor.version.remote()) == 1  # the process answers
    with pytest.raises(EngineFailed):
        ray.get(survivor.actor.probe.remote(np.zeros(2, dtype=np.int32)))
    with pytest.raises(NoWorkerLeft, match=r"rollout-0 is dead \(EngineFailed: .*rollout-1 is dead \(Actor\w+Error"):
        two_workers.generate(requests_for(8))


def _spoil_a_layer(worker: RolloutWorker) -> None:
    """Make the next forward pass raise, for real."""
    thread = worker._engine._engine_thread
    model = thread.llm.model_executor.driver_worker.worker.model_runner.get_model()
    model.model.norm.weight = torch.nn.Parameter(torch.zeros(3))
