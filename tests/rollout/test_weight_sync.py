"""Weights from a learner to the real engine: they arrive exactly and completely, or the worker is not used."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import ray
from transformers import AutoModelForCausalLM

from rlhf_ray.rollout.requests import NoWorkerLeft, TornWeights
from rlhf_ray.rollout.workers import State
from rlhf_ray.types import RolloutRequest
from rlhf_ray.weights.bucket import pack

if TYPE_CHECKING:
    from conftest import LearnerRanks, RunningPool

Requests = Callable[..., list[RolloutRequest]]

pytestmark = pytest.mark.usefixtures("restore")


def _difference(running: RunningPool, learner: LearnerRanks, length: int = 100) -> float:
    """Largest |Δ logprob| between engine and learner, on other tokens than the update's probe."""
    tokens = np.random.default_rng(99).integers(0, 64, length, dtype=np.int32)
    engine = ray.get(running.pool.workers[0].actor.probe.remote(tokens))
    return float(np.abs(engine - learner.call("probe_logprobs", tokens)).max())


def test_engine_and_learner_agree_after_every_weight_update(
    one_worker: RunningPool, learner: LearnerRanks, requests_for: Requests
) -> None:
    """Oracle 24, with tied embeddings, in buckets smaller than the largest tensors."""
    before = one_worker.generate(requests_for(4))
    for version in (1, 2):
        learner.call("perturb", version)
        assert _difference(one_worker, learner) > 0.1
        assert one_worker.sync_weights(version, learner) == ["rollout-0"]
        assert _difference(one_worker, learner) <= 1e-5
        after = one_worker.generate(requests_for(4))
        assert all(set(rollout.versions) == {version} for rollout in after.values())
        assert any(not np.array_equal(after[id].token_ids, before[id].token_ids) for id in after)
        assert ray.get(one_worker.pool.workers[0].actor.version.remote()) == version


def test_a_worker_that_disagrees_is_not_used_until_it_agrees(
    one_worker: RunningPool, learner: LearnerRanks, requests_for: Requests
) -> None:
    """The learner sends other weights than those with which it answers the probe."""
    learner.call("misbehave", error=0.01)
    with pytest.raises(NoWorkerLeft, match=r"rollout-0 is stale \(its log-probabilities on the probe differ"):
        one_worker.sync_weights(1, learner)
    assert one_worker.events[-1].kind == "stale" and one_worker.pool.workers[0].state is State.STALE
    with pytest.raises(NoWorkerLeft, match="4 requests wait and no rollout worker can take them: rollout-0 is stale"):
        one_worker.generate(requests_for(4))
    learner.call("misbehave")
    assert one_worker.sync_weights(1, learner) == ["rollout-0"]
    assert len(one_worker.generate(requests_for(4))) == 4


def test_after_an_interrupted_update_the_torn_weights_cannot_be_used(
    one_worker: RunningPool, learner: LearnerRanks, requests_for: Requests
) -> None:
    learner.call("perturb", 1)
    learner.call("misbehave", fail_after=3)
    with pytest.raises(RuntimeError, match="interrupted on purpose"):
        one_worker.sync_weights(1, learner)
    [member] = one_worker.pool.workers
    assert member.state is State.STALE and "interrupted on purpose" in member.cause
    with pytest.raises(TornWeights):  # also if the worker is called directly
        ray.get(member.actor.probe.remote(np.zeros(4, dtype=np.int32)))
    assert ray.get(member.actor.version.remote()) is None
    learner.call("misbehave")
    assert one_worker.sync_weights(1, learner) == ["rollout-0"]
    assert _difference(one_worker, learner) <= 1e-5


def test_an_update_without_a_parameter_is_refused_by_its_name(one_worker: RunningPool, learner: LearnerRanks) -> None:
    learner.call("misbehave", left_out="model.norm.weight")
    with pytest.raises(NoWorkerLeft, match=r"IncompleteWeights: 1 parameters were not sent, such as \['model.norm"):
        one_worker.sync_weights(1, learner)
    learner.call("misbehave")
    assert one_worker.sync_weights(1, learner) == ["rollout-0"]


def test_requests_wait_during_a_weight_update(
    one_worker: RunningPool, learner: LearnerRanks, requests_for: Requests
) -> None:
    async def both() -> list:
        update = asyncio.create_task(one_worker.pool.sync_weights(7, learner))
        await asyncio.sleep(0)
        rollouts = [rollout async for rollout in one_worker.pool.generate(requests_for(3))]
        assert update.done()
        return rollouts

    assert all(set(rollout.versions) == {7} for rollout in asyncio.run(both()))


def test_weights_of_a_folder_replace_the_policy(
    one_worker: RunningPool, learner: LearnerRanks, policy_folder: Path, tmp_path: Path, requests_for: Requests
) -> None:
    control = one_worker.generate(requests_for(4))
    model = AutoModelForCausalLM.from_pretrained(policy_folder)
    model.model.norm.weight.data.mul_(1.7)
    model.save_pretrained(tmp_path / "other")
    asyncio.run(one_worker.pool.load_folder(str(tmp_path / "other"), 5))
    other = one_worker.generate(requests_for(4))
    assert all(set(rollout.versions) == {5} for rollout in other.values())
    assert any(not np.array_equal(other[id].logprobs, control[id].logprobs) for id in control)
    asyncio.run(one_worker.pool.load_folder(str(policy_folder), 0))
    again = one_worker.generate(requests_for(4))
    assert all(np.array_equal(again[id].logprobs, control[id].logprobs) for id in control)
    assert _difference(one_worker, learner) <= 1e-5


def test_a_folder_without_safetensors_leaves_the_worker_unused(one_worker: RunningPool, tmp_path: Path) -> None:
    with pytest.raises(NoWorkerLeft, match="has no \\*.safetensors"):
        asyncio.run(one_worker.pool.load_folder(str(tmp_path), 5))


def test_weights_outside_an_update_are_refused(one_worker: RunningPool) -> None:
    import torch

    bucket = next(pack([("model.norm.weight", torch.zeros(64))], 1000))
    actor = one_worker.pool.workers[0].actor
    with pytest.raises(RuntimeError, match="call start_weight_update first"):
        ray.get(actor.update_weights.remote(bucket))
    with pytest.raises(RuntimeError, match="without start_weight_update"):
        ray.get(actor.finish_weight_update.remote(1))
