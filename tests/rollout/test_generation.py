"""Responses of the real engine: reproducible, complete, and labelled with the right policy."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM

from rlhf_ray.config.rollout import SamplingConfig
from rlhf_ray.rollout.requests import EngineBusy, PromptRefused
from rlhf_ray.types import Prompt, RolloutRequest

if TYPE_CHECKING:
    from conftest import LearnerRanks, RunningPool

Requests = Callable[..., list[RolloutRequest]]
EOS, CONTEXT = 1, 128


def test_a_seed_gives_the_same_response_in_any_company(one_worker: RunningPool, requests_for: Requests) -> None:
    requests = requests_for(40)
    together = one_worker.generate(requests)
    for company in (requests[:1], requests[3:20]):
        for id, rollout in one_worker.generate(company).items():
            assert np.array_equal(rollout.token_ids, together[id].token_ids)
            assert np.array_equal(rollout.logprobs, together[id].logprobs)


def test_samples_of_one_prompt_differ(one_worker: RunningPool, requests_for: Requests) -> None:
    rollouts = one_worker.generate(requests_for(1, samples=8))
    assert len({tuple(rollout.token_ids[:6]) for rollout in rollouts.values()}) == 8


def test_responses_end_by_the_end_token_or_by_the_limit(one_worker: RunningPool, requests_for: Requests) -> None:
    rollouts = one_worker.generate(requests_for(64))
    stopped = [r for r in rollouts.values() if r.finish_reason == "stop"]
    cut = [r for r in rollouts.values() if r.finish_reason == "length"]
    assert stopped and cut and len(stopped) + len(cut) == 64
    assert all(r.token_ids[-1] == EOS and EOS not in r.token_ids[:-1] for r in stopped)
    assert all(len(r) == 24 and EOS not in r.token_ids for r in cut)


def test_sampling_can_be_overridden_for_a_call(one_worker: RunningPool, requests_for: Requests) -> None:
    rollouts = one_worker.generate(requests_for(32), SamplingConfig(max_new_tokens=40, ignore_eos=True))
    assert {len(r) for r in rollouts.values()} == {40}
    assert {r.finish_reason for r in rollouts.values()} == {"length"}
    assert any(EOS in r.token_ids for r in rollouts.values())


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_logprobs_are_those_of_the_distribution_sampled_from(
    one_worker: RunningPool, policy_folder: Path, requests_for: Requests, temperature: float
) -> None:
    """Oracle 24 on responses: engine against Hugging Face forward, after temperature."""
    model = AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float32)
    rollouts = one_worker.generate(requests_for(8), SamplingConfig(max_new_tokens=24, temperature=temperature))
    for rollout in rollouts.values():
        tokens = torch.from_numpy(np.concatenate([rollout.prompt.token_ids, rollout.token_ids])).long()
        with torch.no_grad():
            logits = model(tokens[None]).logits[0, len(rollout.prompt.token_ids) - 1 : -1]
        expected = (logits / temperature).log_softmax(-1).gather(1, tokens[-len(rollout) :, None])[:, 0]
        assert np.abs(expected.numpy() - rollout.logprobs).max() <= 1e-5


def test_a_rollout_carries_its_request_and_a_version_per_token(one_worker: RunningPool, requests_for: Requests) -> None:
    requests = requests_for(4, samples=2)
    rollouts = one_worker.generate(requests)
    for request in requests:
        rollout = rollouts[request.id]
        assert rollout.request is request
        assert rollout.token_ids.dtype == rollout.versions.dtype == np.int32 and rollout.logprobs.dtype == np.float32
        assert rollout.versions.tolist() == [0] * len(rollout)


@pytest.mark.parametrize("length", [0, CONTEXT])
def test_a_prompt_that_does_not_fit_is_refused_by_name_and_nothing_is_generated(
    one_worker: RunningPool, requests_for: Requests, length: int
) -> None:
    bad = RolloutRequest(Prompt("order-17", np.zeros(length, dtype=np.int32), ()), 3, 1)
    with pytest.raises(PromptRefused, match=r"'order-17/3'.*(empty|128)"):
        one_worker.generate([*requests_for(2), bad])
    assert one_worker.pool.workers[0].load == 0


def test_token_ids_of_another_tokenizer_are_refused(one_worker: RunningPool) -> None:
    bad = RolloutRequest(Prompt("p", np.array([5, 64], dtype=np.int32), ()), 0, 1)
    with pytest.raises(PromptRefused, match="token ids from 5 to 64; the model knows 0 to 63"):
        one_worker.generate([bad])


def test_the_worker_itself_refuses_a_prompt_that_does_not_fit(one_worker: RunningPool) -> None:
    with pytest.raises(PromptRefused, match="'probe' has 128 tokens"):
        ray.get(one_worker.pool.workers[0].actor.probe.remote(np.zeros(CONTEXT, dtype=np.int32)))


def test_the_longest_prompt_that_fits_gets_one_token(one_worker: RunningPool, requests_for: Requests) -> None:
    [rollout] = one_worker.generate(requests_for(1, length=CONTEXT - 1)).values()
    assert len(rollout) == 1


def test_two_requests_with_one_id_are_refused(one_worker: RunningPool, requests_for: Requests) -> None:
    with pytest.raises(ValueError, match="same id"):
        one_worker.generate(requests_for(1) * 2)


def test_calls_overlap(one_worker: RunningPool, requests_for: Requests) -> None:
    async def collect(requests: list[RolloutRequest], sampling: SamplingConfig) -> tuple[int, set[int]]:
        lengths = [len(r) async for r in one_worker.pool.generate(requests, sampling)]
        return len(lengths), set(lengths)

    async def both() -> list:
        short, long = (SamplingConfig(max_new_tokens=n, ignore_eos=True) for n in (5, 30))
        return await asyncio.gather(collect(requests_for(40), short), collect(requests_for(40), long))

    assert asyncio.run(both()) == [(40, {5}), (40, {30})]


def test_rollouts_arrive_as_they_finish_and_leaving_early_frees_the_engine(
    one_worker: RunningPool, requests_for: Requests, learner: LearnerRanks
) -> None:
    """During generation a weight update is refused; after leaving it is possible at once."""
    pool = one_worker.pool

    async def leave_after_first() -> float:
        sampling = SamplingConfig(max_new_tokens=110)
        async with aclosing(pool.generate(requests_for(40), sampling)) as rollouts:
            first = await anext(rollouts)
            with pytest.raises(EngineBusy, match=r"\d+ requests are being generated"):
                await pool.sync_weights(1, learner)
            with pytest.raises(EngineBusy, match=r"\d+ sequences are being generated"):
                await pool.workers[0].actor.start_weight_update.remote()
        assert pool.workers[0].load == 0
        assert await pool.sync_weights(0, learner) == ["rollout-0"]
        return len(first)

    assert asyncio.run(leave_after_first()) < 110


def test_a_probe_is_answered_while_the_engine_generates(one_worker: RunningPool, requests_for: Requests) -> None:
    async def check() -> None:
        generation = asyncio.create_task(anext(one_worker.pool.generate(requests_for(32))))
        assert len(await one_worker.pool.workers[0].actor.probe.remote(np.zeros(4, dtype=np.int32))) == 3
        await generation

    asyncio.run(check())


def test_info_says_what_runs_where(one_worker: RunningPool) -> None:
    info = one_worker.pool.workers[0].info
    assert info.vocabulary == 64 and info.pid > 0 and info.host
