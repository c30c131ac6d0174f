"""Environments for tests, and a real engine on a small model that ends some of its turns."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from pathlib import Path

import pytest
import torch

from rlhf_ray.config.rollout import EnvironmentConfig, RolloutConfig, SamplingConfig
from rlhf_ray.config.section import Workers
from rlhf_ray.data.tokenize import encode_prompt
from rlhf_ray.driver.workers import Roles
from rlhf_ray.environments.base import EnvironmentFailed, Step
from rlhf_ray.environments.runner import EpisodeRunner
from rlhf_ray.models.loading import load_tokenizer
from rlhf_ray.models.tiny import build_tiny_model
from rlhf_ray.rollout.pool import RolloutPool
from rlhf_ray.types import Prompt, Rollout, RolloutRequest, rollout_seed

CONTEXT = 160
MODULE = sys.modules[__name__]


class Echo:
    """Repeats the beginning of each response, rewards its length, and may open with a greeting."""

    def __init__(self, greeting: str = "", slow_s: float = 0.0) -> None:
        self.greeting, self.slow_s, self.turns = greeting, slow_s, 0

    def reset(self, prompt: Prompt, seed: int) -> str | tuple:
        self.slow = self.slow_s if prompt.id == "p0" else 0.0
        self.seed = seed
        return self.greeting or ()

    def step(self, response: str) -> Step:
        time.sleep(self.slow)
        self.turns += 1
        return Step(f"{self.turns}: {response[:8]}", reward=float(len(response)))


class Faulty(Echo):
    """Fails in the way that `greeting` names."""

    def step(self, response: str) -> Step:
        if self.greeting == "raise":
            raise LookupError("no such order")
        return {"slow": time.sleep, "text": str, "nan": lambda _: Step("x", float("nan")), "silent": lambda _: Step(),
                "assistant": lambda _: Step([{"role": "assistant", "content": "I"}])}[self.greeting](3.0)  # fmt: skip


class NoStep:
    """An environment without `step`."""

    def reset(self, prompt: Prompt, seed: int) -> tuple:
        return ()


@pytest.fixture(scope="session")
def environment() -> Callable[..., EnvironmentConfig]:
    """Builds the config of an environment of this module."""
    sys.modules["environments_for_tests"] = MODULE

    def make(name: str = "Echo", **settings: object) -> EnvironmentConfig:
        return EnvironmentConfig.model_validate({"class": f"environments_for_tests:{name}"} | settings)

    return make


@pytest.fixture(scope="session")
def talking_model(tmp_path_factory) -> Path:
    """Random weights, but the end of a turn is likely enough for several turns in a short context."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("models") / "talking"
    texts = ["Hello, where is my order 1234?", "I am sorry. Your order 1234 will arrive on Monday."] * 20
    build_tiny_model(folder, texts, vocab_size=320, hidden_size=64, layers=2, heads=2, kv_heads=1, max_positions=256)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        ids = torch.randint(3, 320, (16, 64), generator=torch.Generator().manual_seed(0))
        usual = model.model(ids).last_hidden_state.mean(dim=(0, 1))
        model.model.embed_tokens.weight[load_tokenizer(folder).eos_token_id] += 4 * usual / usual.square().sum()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pool(ray_cluster: None, talking_model: Path) -> Iterator[RolloutPool]:
    config = RolloutConfig(
        workers=Workers(cpus=0.1, threads=1), max_concurrent=64, kv_cache_gb=0.05,
        sampling=SamplingConfig(max_new_tokens=24),
    )  # fmt: skip
    started = RolloutPool(config)
    # A pool belongs to one event loop; a new one for each asyncio.run works because no call is running in between.
    asyncio.run(started.start(str(talking_model), CONTEXT, 0, lambda index: {"num_cpus": 0.1}))
    yield started
    asyncio.run(started.close())


@pytest.fixture(scope="session")
def play(pool: RolloutPool, talking_model: Path) -> Callable[..., list[Rollout | EnvironmentFailed]]:
    """Play episodes on the real engine; the results in the order of arrival."""

    def run(config: EnvironmentConfig | None, requests: Sequence[RolloutRequest], context: int = CONTEXT) -> list:
        async def collect() -> list:
            episodes = config and EpisodeRunner(pool, load_tokenizer(talking_model), config, context)
            roles = Roles(pool, episodes=episodes)
            async with aclosing(roles.generate(requests)) as arriving:
                return [item async for item in arriving]

        return asyncio.run(collect())

    return run


@pytest.fixture(scope="session")
def ask(talking_model: Path) -> Callable[..., list[RolloutRequest]]:
    """Builds requests for a number of prompts."""
    tokenizer = load_tokenizer(talking_model)

    def make(prompts: int, samples: int = 1) -> list[RolloutRequest]:
        requests = []
        for p in range(prompts):
            messages = ({"role": "user", "content": f"Hello, where is my order {p}?"},)
            prompt = Prompt(f"p{p}", encode_prompt(tokenizer, messages), messages)
            requests += [RolloutRequest(prompt, s, rollout_seed("test", prompt.id, s)) for s in range(samples)]
        return requests

    return make
