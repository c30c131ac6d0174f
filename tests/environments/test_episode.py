"""Episodes as tokens: what is masked, where the rewards are, how an episode ends."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rlhf_ray.data.tokenize import encode_prompt
from rlhf_ray.environments.base import Step
from rlhf_ray.environments.episode import Episode, Limits, ObservationTooLong
from rlhf_ray.environments.template import TurnRenderer
from rlhf_ray.models.tiny import train_tokenizer
from rlhf_ray.types import NOT_SAMPLED, Prompt, Rollout, RolloutRequest, Score, rollout_seed, turn_seed

QUESTION = {"role": "user", "content": "Where is order 42?"}
AGAIN = Step(({"role": "user", "content": "Which order?"},), reward=0.5)
LIMITS = Limits(turns=3, observation_tokens=64, context=256)


@pytest.fixture(scope="module")
def renderer() -> TurnRenderer:
    return TurnRenderer(train_tokenizer(["Where is order 42? Which order? On its way."] * 20, 300, 256))


@pytest.fixture
def episode(renderer) -> Episode:
    prompt = Prompt("p", encode_prompt(renderer.tokenizer, [QUESTION]), (QUESTION,))
    return Episode(RolloutRequest(prompt, 0, 7), object(), renderer.opening([QUESTION]))


def turn(episode: Episode, renderer: TurnRenderer, text: str, finish: str = "stop") -> Rollout:
    """A turn as an engine may sample it: not the tokenizer's tokens of the text, but one token per byte."""
    tokenizer, request = renderer.tokenizer, episode.next_request
    ids = [i for character in text for i in tokenizer.encode(character, add_special_tokens=False)]
    ids += [tokenizer.eos_token_id] if finish == "stop" else []
    logprobs = -np.arange(1, len(ids) + 1, dtype=np.float32)
    return Rollout(request, np.asarray(ids, dtype=np.int32), logprobs, np.full(len(ids), 3, dtype=np.int32), finish)


def test_several_turns_become_one_rollout(episode, renderer):
    first = turn(episode, renderer, "Order?")
    assert episode.add(first, AGAIN, renderer, LIMITS) is None
    second = turn(episode, renderer, "On its way.")
    rollout = episode.add(second, Step("not part of the rollout", 2.0, done=True), renderer, LIMITS)
    assert rollout.request is episode.request and rollout.finish_reason == "stop"
    assert rollout.token_ids[rollout.sampled_mask].tolist() == [*first.token_ids, *second.token_ids], (
        "as they were sampled"
    )
    observed = renderer.tokenizer.decode(rollout.token_ids[~rollout.sampled_mask])
    assert observed == "\n<|im_start|>user\nWhich order?<|im_end|>\n<|im_start|>assistant\n"
    assert rollout.sampled_count == len(first) + len(second) == rollout.sampled_mask.sum() and rollout.sampled_mask[-1]
    assert (rollout.logprobs[~rollout.sampled_mask] == 0).all() and (
        rollout.versions[~rollout.sampled_mask] == NOT_SAMPLED
    ).all()
    assert rollout.logprobs[rollout.sampled_mask].tolist() == [*first.logprobs, *second.logprobs]
    assert [(t.text, t.reward, t.observation) for t in rollout.turns] == [
        ("Order?", 0.5, AGAIN.observation),
        ("On its way.", 2.0, ()),
    ]
    assert Score(1.0, {"model": 1.0}).with_turns(rollout) == Score(3.5, {"model": 1.0, "environment": 2.5})


def test_the_next_request_has_the_whole_conversation_and_its_own_seed(episode, renderer):
    assert episode.next_request is episode.request, "the first turn has the rollout's own seed, and nothing is copied"
    first = turn(episode, renderer, "Order?")
    episode.add(first, AGAIN, renderer, LIMITS)
    request = episode.next_request
    conversation = [QUESTION, {"role": "assistant", "content": "Order?"}, *AGAIN.observation]
    assert renderer.tokenizer.decode(request.prompt.token_ids) == renderer.opening(conversation)
    assert request.id == episode.request.id and request.seed == turn_seed(7, 1) != 7
    assert len({turn_seed(seed, n) for seed in (7, 8) for n in range(4)} | {rollout_seed("turn", "x", 1)}) == 9


def test_rewards_are_given_for_the_last_turn_as_a_rollout_of_its_own(episode, renderer):
    alone = episode.add(turn(episode, renderer, "On its way."), Step(done=True), renderer, LIMITS)
    assert alone.final_turn is alone
    other = Episode(episode.request, object(), renderer.opening([QUESTION]))
    other.add(turn(other, renderer, "Order?"), AGAIN, renderer, LIMITS)
    rollout = other.add(turn(other, renderer, "On its way."), Step(done=True), renderer, LIMITS)
    final = rollout.final_turn
    roles = [message["role"] for message in final.prompt.messages]
    assert roles == ["user", "assistant", "user"] and final.id == rollout.id
    assert renderer.text(final.token_ids) == "On its way." and final.sampled_mask.all()
    whole = [np.concatenate([r.prompt.token_ids, r.token_ids]).tolist() for r in (rollout, final)]
    assert whole[0] == whole[1], "a reward model reads the same"


def test_a_truncated_turn_ends_the_episode_and_keeps_its_reward(episode, renderer):
    rollout = episode.add(turn(episode, renderer, "On its", "length"), AGAIN, renderer, LIMITS)
    assert rollout.finish_reason == "length" and len(rollout.turns) == 1 and rollout.turns[0].reward == 0.5


def test_the_last_allowed_turn_ends_the_episode(episode, renderer):
    assert episode.add(turn(episode, renderer, "a"), AGAIN, renderer, replace(LIMITS, turns=2)) is None
    rollout = episode.add(turn(episode, renderer, "b"), AGAIN, renderer, replace(LIMITS, turns=2))
    assert rollout.finish_reason == "stop" and len(rollout.turns) == 2 and rollout.turns[-1].observation == ()


@pytest.mark.parametrize(("room", "ends"), [(0, True), (1, False)])
def test_an_observation_that_leaves_no_room_for_a_token_ends_the_episode(episode, renderer, room, ends):
    first = turn(episode, renderer, "a")
    probe = Episode(episode.request, object(), episode.rendered)
    probe.add(first, AGAIN, renderer, LIMITS)
    context = len(probe.next_request.prompt.token_ids) + room
    rollout = episode.add(first, AGAIN, renderer, replace(LIMITS, context=context))
    assert (rollout is not None) == ends
    if ends:
        assert rollout.finish_reason == "length" and len(rollout) == len(first)


def test_an_observation_that_is_too_long_is_refused(episode, renderer):
    with pytest.raises(ObservationTooLong, match="max_observation_tokens is 5"):
        episode.add(turn(episode, renderer, "a"), AGAIN, renderer, replace(LIMITS, observation_tokens=5))


def test_without_an_environment_the_response_is_the_rollout(episode, renderer):
    rollout = turn(episode, renderer, "On its", "length")
    assert rollout.turns == () and rollout.sampled_mask.all() and rollout.finish_reason == "length"
    assert rollout.sampled_count == len(rollout) and rollout.final_turn is rollout
    assert Score(1.0, {}).with_turns(rollout) == Score(1.0, {})
