"""Updates that send only an adapter, on the real engine: what it computes, what replaces it, and what is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM

from rlhf_ray.config.learner import LoraConfig
from rlhf_ray.config.rollout import RolloutConfig, WeightChannelConfig
from rlhf_ray.config.section import Workers
from rlhf_ray.models.lora import adapter_weights, add_adapters
from rlhf_ray.rollout.pool import RolloutPool
from rlhf_ray.rollout.requests import NoWorkerLeft
from rlhf_ray.weights.bucket import WeightBucket, pack

if TYPE_CHECKING:
    from ray.actor import ActorHandle

LORA = LoraConfig(rank=4, alpha=6.0)
BUCKET_BYTES = 4096


class AdapterLearner:
    """A rank that sends the adapters of a Hugging Face model."""

    def __init__(self, folder: str, lora: LoraConfig) -> None:
        torch.set_num_threads(1)
        self.model = add_adapters(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), lora, seed=0)
        self.sent = 0

    def perturb(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for weight in adapter_weights(self.model):
            weight.parameters[0].data += 0.2 * torch.randn(weight.shape, generator=generator)

    def weight_buckets(self, bucket_bytes: int) -> Iterator[WeightBucket]:
        self.sent = 0
        for bucket in pack(((w.name, w.value()) for w in adapter_weights(self.model)), bucket_bytes):
            self.sent += bucket.data.nbytes
            yield bucket

    def bytes_sent(self) -> int:
        return self.sent

    @torch.no_grad()
    def probe_logprobs(self, token_ids: np.ndarray) -> np.ndarray:
        tokens = torch.from_numpy(token_ids).long()
        logprobs = self.model(tokens[None]).logits[0, :-1].log_softmax(-1)
        return logprobs.gather(1, tokens[1:, None])[:, 0].numpy()


class OneRank:
    """A learner with one rank (`WeightSender`)."""

    def __init__(self, rank: ActorHandle) -> None:
        self.ranks = (rank,)

    async def probe_logprobs(self, token_ids: np.ndarray) -> np.ndarray:
        return await self.ranks[0].probe_logprobs.remote(token_ids)


@pytest.fixture(scope="module")
def pool(ray_session, policy_folder: Path) -> Iterator[RolloutPool]:
    config = RolloutConfig(
        workers=Workers(cpus=0.1),
        max_concurrent=32,
        kv_cache_gb=0.05,
        weights=WeightChannelConfig(lora="adapter", bucket_mb=BUCKET_BYTES / (1 << 20), timeout_s=60),
    )
    pool = RolloutPool(config, lora=LORA)
    asyncio.run(pool.start(str(policy_folder), 128, 0, lambda index: {"num_cpus": 0.1}))
    yield pool
    asyncio.run(pool.close())


@pytest.fixture(scope="module")
def learner(ray_session, policy_folder: Path) -> OneRank:
    ray.cloudpickle.register_pickle_by_value(__import__("sys").modules[__name__])
    return OneRank(ray.remote(num_cpus=0.1)(AdapterLearner).remote(str(policy_folder), LORA))


def difference(pool: RolloutPool, learner: OneRank) -> float:
    """Largest |Δ logprob| between engine and learner, on other tokens than the update's probe."""
    tokens = np.random.default_rng(99).integers(0, 64, 100, dtype=np.int32)
    engine, expected = ray.get(
        [pool.workers[0].actor.probe.remote(tokens), learner.ranks[0].probe_logprobs.remote(tokens)]
    )
    return float(np.abs(engine - expected).max())


def test_oracle_24_of_adapters(pool, learner):
    """Every update replaces the adapter; far fewer bytes travel than the model has."""
    assert difference(pool, learner) <= 1e-5, "a fresh adapter changes nothing"
    for version in (1, 2, 3):
        ray.get(learner.ranks[0].perturb.remote(version))
        assert difference(pool, learner) > 0.1
        assert asyncio.run(pool.sync_weights(version, learner)) == ["rollout-0"]
        assert difference(pool, learner) <= 1e-5
        assert ray.get(pool.workers[0].actor.version.remote()) == version
    # Two layers of 7 matrices of width 64, with rank 4.
    assert 0 < ray.get(learner.ranks[0].bytes_sent.remote()) < 40_000


def test_a_folder_replaces_base_and_adapter_and_no_adapter_fits_it_afterwards(pool, learner, policy_folder, tmp_path):
    """Evaluation loads whole models; after that the engine does not have the base model of the adapters."""
    other = AutoModelForCausalLM.from_pretrained(policy_folder)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    other.save_pretrained(tmp_path / "other")
    asyncio.run(pool.load_folder(str(tmp_path / "other"), 9))
    tokens = np.random.default_rng(5).integers(0, 64, 50, dtype=np.int32)
    with torch.no_grad():
        logprobs = other(torch.from_numpy(tokens).long()[None]).logits[0, :-1].log_softmax(-1)
    expected = logprobs.gather(1, torch.from_numpy(tokens).long()[1:, None])[:, 0].numpy()
    np.testing.assert_allclose(ray.get(pool.workers[0].actor.probe.remote(tokens)), expected, atol=1e-5)
    with pytest.raises(NoWorkerLeft, match="whose base model was replaced by a folder's weights"):
        asyncio.run(pool.sync_weights(10, learner))
