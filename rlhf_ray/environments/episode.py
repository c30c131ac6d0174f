"""One episode as tokens: the policy's turns as they were sampled, and the environment's messages between them. Pure functions.

Invariants: sampled token ids are never changed and never tokenised again; an episode ends with a turn of the policy, so the
environment's last observation is not part of it; an episode always fits into the context.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from rlhf_ray.config.rollout import EnvironmentConfig
from rlhf_ray.environments.base import Environment, Message, Step, messages_of
from rlhf_ray.environments.template import TurnRenderer
from rlhf_ray.types import NOT_SAMPLED, FinishReason, Rollout, RolloutRequest, Turn, turn_seed


@dataclass(frozen=True)
class Limits:
    """What an episode may not exceed."""

    turns: int
    """Turns of the policy."""
    observation_tokens: int
    """Tokens of one observation."""
    context: int
    """Tokens of the prompt and everything after it."""

    @classmethod
    def of(cls, config: EnvironmentConfig, context: int) -> Limits:
        """The limits of a configured environment."""
        return cls(config.max_turns, config.max_observation_tokens, context)


class ObservationTooLong(ValueError):
    """An observation has more tokens than the configuration allows."""


class _Segment(NamedTuple):
    """The tokens of one turn of the policy, or of one observation; the columns are those of a `Rollout`."""

    token_ids: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray


@dataclass
class Episode:
    """An episode that is not finished yet."""

    request: RolloutRequest
    """Its prompt includes what the environment's `reset` returned."""
    environment: Environment
    rendered: str
    """The conversation as text, up to the policy's next turn."""
    turns: list[Turn] = field(default_factory=list)
    _segments: list[_Segment] = field(default_factory=list)
    """The policy's turns and the observations between them."""

    @property
    def next_request(self) -> RolloutRequest:
        """The request for the next turn: its prompt is the conversation's tokens, and it has a seed of its own."""
        if not self.turns:
            return self.request
        prompt_ids = np.concatenate([self.request.prompt.token_ids, *(part.token_ids for part in self._segments)])
        prompt = replace(self.request.prompt, token_ids=prompt_ids)
        return replace(self.request, prompt=prompt, seed=turn_seed(self.request.seed, len(self.turns)))

    def add(self, sampled: Rollout, step: Step, renderer: TurnRenderer, limits: Limits) -> Rollout | None:
        """Add the policy's next turn and the environment's step. Returns the whole rollout if the episode ends here.

        A turn that reached the token limit ends the episode, because it has no end that an observation could follow. An
        observation that leaves no room for another turn is not added, and the episode ends with `length`.

        Raises:
            ObservationTooLong, TemplateRefused: the observation cannot be used.
        """
        start = sum(len(part.token_ids) for part in self._segments)
        self._segments.append(_Segment(sampled.token_ids, sampled.logprobs, sampled.versions))
        turn = Turn(start, start + len(sampled), renderer.text(sampled.token_ids), step.reward)
        before, self.turns = self._messages, [*self.turns, turn]
        if step.done or sampled.finish_reason == "length" or len(self.turns) == limits.turns:
            return self._finished(sampled.finish_reason)
        observation = messages_of(step.observation)
        end = int(sampled.token_ids[-1])
        self.rendered, ids = renderer.continuation(self.rendered, before, turn.text, observation, end)
        if len(ids) > limits.observation_tokens:
            raise ObservationTooLong(
                f"an observation has {len(ids)} tokens; environment.max_observation_tokens is {limits.observation_tokens}"
            )
        if len(self.request.prompt.token_ids) + turn.stop + len(ids) >= limits.context:
            return self._finished("length")
        self.turns[-1] = replace(turn, observation=observation)
        versions = np.full(len(ids), NOT_SAMPLED, dtype=np.int32)
        self._segments.append(_Segment(ids, np.zeros(len(ids), dtype=np.float32), versions))
        return None

    @property
    def _messages(self) -> tuple[Message, ...]:
        messages = list(self.request.prompt.messages)
        for turn in self.turns:
            messages += [{"role": "assistant", "content": turn.text}, *turn.observation]
        return tuple(messages)

    def _finished(self, reason: FinishReason) -> Rollout:
        token_ids, logprobs, versions = map(np.concatenate, zip(*self._segments, strict=True))
        return Rollout(self.request, token_ids, logprobs, versions, reason, tuple(self.turns))
