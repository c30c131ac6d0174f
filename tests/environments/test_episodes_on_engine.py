"""Episodes on the real engine: reproducible, continuous, and scored by the learner as the engine sampled them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf_ray.algorithms.advantages import gae
from rlhf_ray.batch import pad
from rlhf_ray.config.algorithm import AlgorithmConfig, KLConfig
from rlhf_ray.config.reward import ScorerConfig
from rlhf_ray.config.section import Workers
from rlhf_ray.driver.training_batch import collate, prepare
from rlhf_ray.environments.base import EnvironmentFailed
from rlhf_ray.models.heads import TokenLogprobs
from rlhf_ray.models.loading import load_causal_lm
from rlhf_ray.rewards.workers import ReferenceWorker
from rlhf_ray.types import Experience, Rollout, Score

PROMPTS = 12


@pytest.fixture(scope="module")
def episodes(play, ask, environment) -> list[Rollout]:
    rollouts = play(environment(), ask(PROMPTS, samples=2))
    assert sum(len(rollout.turns) > 1 for rollout in rollouts) >= 4, (
        "the model must end some turns, or this tests nothing"
    )
    return sorted(rollouts, key=lambda rollout: rollout.id)


def test_every_request_is_answered_once_and_within_limits(episodes):
    assert len({rollout.id for rollout in episodes}) == len(episodes) == 2 * PROMPTS
    assert {rollout.finish_reason for rollout in episodes} == {"stop", "length"}
    assert max(len(rollout.turns) for rollout in episodes) > 2
    for rollout in episodes:
        assert len(rollout.prompt.token_ids) + len(rollout) <= 160 and len(rollout.turns) <= 4
        assert (
            rollout.sampled_mask[0] and rollout.sampled_mask[-1] and (rollout.versions[rollout.sampled_mask] == 0).all()
        )


def test_learner_and_engine_agree_on_every_chosen_token(episodes, talking_model: Path):
    """Oracle 24, over several turns: the learner reads what the engine read before each turn."""
    batch = collate([Experience(rollout, Score(0.0, {}), None) for rollout in episodes])
    policy = TokenLogprobs(load_causal_lm(talking_model), 1.0)
    with torch.no_grad():
        logprobs = policy(pad(batch))[0].numpy()
    assert np.abs(logprobs - batch.rollout_logprobs).max() <= 1e-5
    assert len(logprobs) == sum(rollout.sampled_count for rollout in episodes) < sum(map(len, episodes))


def test_the_reference_worker_answers_for_chosen_tokens(episodes, talking_model: Path):
    worker = ReferenceWorker(ScorerConfig(workers=Workers(threads=1), micro_batch_tokens=256), str(talking_model), 1.0)
    for rollout, logprobs in zip(episodes, worker.logprobs(episodes), strict=True):
        np.testing.assert_allclose(logprobs, rollout.logprobs[rollout.sampled_mask], atol=1e-5)


def test_episodes_are_reproducible_in_other_batches(play, ask, environment, episodes):
    for again in play(environment(), ask(PROMPTS, samples=2)[3:9]):
        [rollout] = [rollout for rollout in episodes if rollout.id == again.id]
        assert rollout.token_ids.tolist() == again.token_ids.tolist() and rollout.turns == again.turns
        assert (rollout.logprobs == again.logprobs).all()


def test_no_episode_waits_for_a_slow_one(play, ask, environment):
    """The first prompt's environment takes 1.5 s per turn; the other episodes finish before it."""
    arrived = play(environment(arguments={"slow_s": 1.5}), ask(6))
    assert arrived[-1].id == "p0/0" and any(len(rollout.turns) > 1 for rollout in arrived[:-1])


def test_the_opening_messages_are_part_of_the_prompt(play, ask, environment):
    [rollout] = play(environment(arguments={"greeting": "Good morning."}), ask(1))
    assert rollout.prompt.messages[-1] == {"role": "user", "content": "Good morning."}
    [plain] = ask(1)
    assert rollout.prompt.id == plain.prompt.id and len(rollout.prompt.token_ids) > len(plain.prompt.token_ids)


def test_a_prompt_without_room_is_an_error_of_its_episode(play, ask, environment):
    [failed] = play(environment(arguments={"greeting": "Good morning. " * 20}), ask(1), context=60)
    assert isinstance(failed, EnvironmentFailed) and "the context is 60" in str(failed)


def test_failures_are_results_and_do_not_stop_the_others(play, ask, environment):
    failed = play(environment("Faulty", arguments={"greeting": "raise"}), ask(5))
    assert all(isinstance(item, EnvironmentFailed) for item in failed)
    assert {item.rollout_id for item in failed} == {f"p{p}/0" for p in range(5)}


def test_without_an_environment_rollouts_come_straight_from_the_pool(play, ask, pool):
    requests = ask(8)
    rollouts = play(None, requests)
    sent = {request.id: request for request in requests}
    assert all(rollout.request is sent[rollout.id] for rollout in rollouts), "no request is copied"
    assert all(rollout.turns == () and rollout.sampled_mask.all() and len(rollout) <= 24 for rollout in rollouts)
    assert all(member.load == 0 for member in pool.workers)


def test_advantages_skip_the_observations(episodes):
    """GAE end to end: rewards at the turns' ends, and the recursion over the sampled tokens only, cut out by hand."""
    experiences = [
        Experience(r, Score(float(i), {"model": float(i)}).with_turns(r), None) for i, r in enumerate(episodes)
    ]
    batch = collate(experiences)
    values = np.random.default_rng(0).normal(size=int(batch.target_mask.sum())).astype(np.float32)
    algorithm = AlgorithmConfig(kl=KLConfig(placement="none"), whiten_advantages=False, gamma=0.98, lam=0.9)
    prepared = prepare(experiences, batch.with_columns(old_values=values), algorithm, 0.0, 96)
    assert len(prepared.batch.advantages) == batch.target_mask.sum()
    start = 0
    for index, rollout in enumerate(episodes):
        rewards, full_values = np.zeros(len(rollout), dtype=np.float32), np.full(len(rollout), 1e6, dtype=np.float32)
        full_values[rollout.sampled_mask] = values[start : start + rollout.sampled_count]
        for turn in rollout.turns:
            rewards[turn.stop - 1] += turn.reward
        rewards[-1] += index
        tensors = (torch.from_numpy(x)[None] for x in (rewards, full_values, rollout.sampled_mask))
        expected = gae(*tensors, 0.98, 0.9)[0][0].numpy()[rollout.sampled_mask]
        actual = prepared.batch.advantages[start : start + rollout.sampled_count]
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-4)
        start += rollout.sampled_count
