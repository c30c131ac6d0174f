"""Many episodes at the same time, on a hand-written pool: no Ray and no engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

import numpy as np
import pytest

from rlhf_ray.config.rollout import EnvironmentConfig
from rlhf_ray.data.tokenize import encode_prompt
from rlhf_ray.environments.base import EnvironmentFailed
from rlhf_ray.environments.runner import EpisodeRunner
from rlhf_ray.models.tiny import train_tokenizer
from rlhf_ray.types import Prompt, Rollout, RolloutRequest, turn_seed

TOKENIZER = train_tokenizer(["Where is order 42? 1: Here. 2: Here. 3: Here."] * 20, 300, 256)


class ScriptedPool:
    """Answers every request with the same turn and records the calls."""

    def __init__(self) -> None:
        self.calls: list[list[RolloutRequest]] = []
        self.running = 0

    async def generate(self, requests: Sequence[RolloutRequest]) -> AsyncGenerator[Rollout]:
        self.calls.append(list(requests))
        self.running += 1
        try:
            for request in requests:
                await asyncio.sleep(0.001)
                ids = np.asarray(
                    [*TOKENIZER.encode("Here.", add_special_tokens=False), TOKENIZER.eos_token_id], np.int32
                )
                yield Rollout(request, ids, np.zeros(len(ids), np.float32), np.zeros(len(ids), np.int32), "stop")
        finally:
            self.running -= 1


def make_requests(count: int) -> list[RolloutRequest]:
    messages = ({"role": "user", "content": "Where is order 42?"},)
    ids = encode_prompt(TOKENIZER, messages)
    return [RolloutRequest(Prompt(f"p{index}", ids, messages), 0, 100 + index) for index in range(count)]


def play(
    config: EnvironmentConfig, requests: list[RolloutRequest], leave_after: int | None = None
) -> tuple[ScriptedPool, list]:
    pool, results = ScriptedPool(), []

    async def collect() -> None:
        async with aclosing(EpisodeRunner(pool, TOKENIZER, config, 256).run(requests)) as arriving:
            async for result in arriving:
                results.append(result)
                if len(results) == leave_after:
                    break

    asyncio.run(collect())
    return pool, results


def test_every_request_becomes_one_episode_and_ready_turns_share_calls(environment: Callable[..., EnvironmentConfig]):
    requests = make_requests(5)
    pool, results = play(environment(max_turns=3), requests)
    assert sorted(rollout.id for rollout in results) == [request.id for request in requests]
    assert all(len(rollout.turns) == 3 and rollout.finish_reason == "stop" for rollout in results)
    assert all(rollout.request in requests for rollout in results), "a rollout has the request that was made"
    assert all(request in requests for request in pool.calls[0]), "the first turn's request is not copied"
    assert len(pool.calls) < 15, "turns that are ready at about the same time share a call"
    for number, request in enumerate(sorted(pool.calls[-1], key=lambda request: request.id), 5 - len(pool.calls[-1])):
        assert request.seed == turn_seed(100 + number, 2)


def test_a_failed_episode_is_a_result_and_the_others_go_on(environment: Callable[..., EnvironmentConfig]):
    config = environment(max_turns=2, timeout_s=0.2, arguments={"slow_s": 1.0})  # p0's environment is slow
    _, results = play(config, make_requests(3))
    assert sorted(rollout.id for rollout in results if isinstance(rollout, Rollout)) == ["p1/0", "p2/0"]
    [failed] = [result for result in results if isinstance(result, EnvironmentFailed)]
    assert failed.rollout_id == "p0/0"


def test_leaving_early_cancels_the_rest(environment: Callable[..., EnvironmentConfig]):
    pool, results = play(environment(max_turns=1), make_requests(8), leave_after=1)
    assert len(results) == 1 and pool.running == 0


def test_an_error_of_the_pool_ends_the_run(environment: Callable[..., EnvironmentConfig], monkeypatch):
    async def fail(self: ScriptedPool, requests: Sequence[RolloutRequest]) -> AsyncGenerator[Rollout]:
        raise LookupError("no worker")
        yield

    monkeypatch.setattr(ScriptedPool, "generate", fail)
    with pytest.raises(LookupError, match="no worker"):
        play(environment(), make_requests(2))
