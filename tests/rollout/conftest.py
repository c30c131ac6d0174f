"""Real engines for the tests of generation: one Ray, one worker on a tiny model, and a learner that is plain PyTorch."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from rlhf_ray.config.rollout import RolloutConfig, SamplingConfig, WeightChannelConfig
from rlhf_ray.config.section import Workers
from rlhf_ray.rollout.pool import RolloutPool
from rlhf_ray.rollout.workers import WorkerEvent
from rlhf_ray.types import Prompt, RolloutRequest, rollout_seed
from rlhf_ray.weights.bucket import WeightBucket, pack

# Ray's workers cannot import a conftest, so its classes are pickled with their code.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

VOCABULARY, EOS, CONTEXT = 64, 1, 128
BUCKET_BYTES = 20_000
"""Smaller than the largest tensors of the model and larger than the smallest."""


class TorchLearner:
    """A rank that sends a Hugging Face model as it is: the oracle."""

    def __init__(self, folder: str, sends: bool) -> None:
        torch.set_num_threads(1)
        self.folder = folder
        self.sends = sends
        self.reset()

    def reset(self) -> None:
        """Policy 0 again, and no faults."""
        self.model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        self.misbehave()

    def perturb(self, seed: int) -> None:
        """Change every weight."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)

    def misbehave(self, fail_after: int | None = None, error: float = 0.0, left_out: str = "") -> None:
        """Fail after some buckets, send other weights than its own, or leave a tensor out."""
        self.fail_after, self.error, self.left_out = fail_after, error, left_out

    def weight_buckets(self, bucket_bytes: int) -> Iterator[WeightBucket]:
        weights = ((n, p + self.error) for n, p in self.model.named_parameters() if n != self.left_out)
        for index, bucket in enumerate(pack(weights, bucket_bytes) if self.sends else ()):
            if index == self.fail_after:
                raise RuntimeError("the learner was interrupted on purpose")
            yield bucket

    @torch.no_grad()
    def probe_logprobs(self, token_ids: np.ndarray) -> np.ndarray:
        tokens = torch.from_numpy(token_ids).long()
        logprobs = self.model(tokens[None]).logits[0, :-1].log_softmax(-1)
        return logprobs.gather(1, tokens[1:, None])[:, 0].numpy()


@dataclass(frozen=True)
class LearnerRanks:
    """Two ranks; the second sends nothing."""

    ranks: tuple[ray.actor.ActorHandle, ...]

    async def probe_logprobs(self, token_ids: np.ndarray) -> np.ndarray:
        return await self.ranks[0].probe_logprobs.remote(token_ids)

    def call(self, method: str, *arguments: object, **named: object) -> object:
        return ray.get(getattr(self.ranks[0], method).remote(*arguments, **named))


@dataclass(frozen=True)
class RunningPool:
    """A started pool and all its events."""

    pool: RolloutPool
    events: list[WorkerEvent]

    def generate(self, requests: list[RolloutRequest], sampling: SamplingConfig | None = None) -> dict:
        """All rollouts by id."""

        async def collect() -> list:
            return [rollout async for rollout in self.pool.generate(requests, sampling)]

        rollouts = asyncio.run(collect())
        assert len(rollouts) == len(requests)
        return {rollout.id: rollout for rollout in rollouts}

    def sync_weights(self, version: int, learner: LearnerRanks) -> list[str]:
        return asyncio.run(self.pool.sync_weights(version, learner))


def make_requests(prompts: int, samples: int = 1, length: int = 12) -> list[RolloutRequest]:
    """Random prompts, the same for the same arguments."""
    generator = np.random.default_rng(length)
    requests = []
    for p in range(prompts):
        prompt = Prompt(f"p{p}", generator.integers(3, VOCABULARY, length, dtype=np.int32), ())
        requests += [RolloutRequest(prompt, s, rollout_seed("test", prompt.id, s)) for s in range(samples)]
    return requests


def start_pool(folder: Path, workers: int = 1) -> RunningPool:
    """A pool on a model folder as policy 0."""
    config = RolloutConfig(
        workers=Workers(count=workers, cpus=0.1, threads=1),
        max_concurrent=32,
        kv_cache_gb=0.05,
        sampling=SamplingConfig(max_new_tokens=24),
        weights=WeightChannelConfig(bucket_mb=BUCKET_BYTES / (1 << 20), timeout_s=60),
    )
    events: list[WorkerEvent] = []
    pool = RolloutPool(config, events.append)
    asyncio.run(pool.start(str(folder), CONTEXT, 0, lambda index: {"num_cpus": 0.1}))
    return RunningPool(pool, events)


@pytest.fixture(scope="session")
def requests_for() -> Callable[..., list[RolloutRequest]]:
    """`make_requests`, for tests."""
    return make_requests


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer random Qwen2 with tied embeddings, end of sequence 1."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=EOS,
    )
    folder = tmp_path_factory.mktemp("policy")
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=[EOS])
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def ray_session(ray_cluster: None) -> None:
    """The Ray that all tests share."""


@pytest.fixture(scope="session")
def start(ray_session: None, policy_folder: Path) -> Callable[[int], RunningPool]:
    """Start a pool with a number of workers; the caller closes it."""
    return lambda workers: start_pool(policy_folder, workers)


@pytest.fixture(scope="session")
def one_worker(ray_session: None, policy_folder: Path) -> Iterator[RunningPool]:
    running = start_pool(policy_folder)
    yield running
    asyncio.run(running.pool.close())


@pytest.fixture(scope="session")
def learner_ranks(ray_session: None, policy_folder: Path) -> LearnerRanks:
    actor = ray.remote(num_cpus=0.1)(TorchLearner)
    return LearnerRanks(tuple(actor.remote(str(policy_folder), sends) for sends in (True, False)))


@pytest.fixture
def learner(learner_ranks: LearnerRanks) -> LearnerRanks:
    """The learner with its first weights."""
    learner_ranks.call("reset")
    return learner_ranks


@pytest.fixture
def restore(one_worker: RunningPool, policy_folder: Path) -> Iterator[None]:
    """Give the shared worker its first weights back after the test."""
    yield
    asyncio.run(one_worker.pool.load_folder(str(policy_folder), 0))
