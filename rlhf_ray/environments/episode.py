"""One episode as its tokens: the turns of the policy as they were sampled, and what was said between them. Pure.

Invariants: a turn's ids are never changed, and never tokenised again; an episode ends with a turn of the policy: what the
environment says last is shown to nobody; it ends exactly once, and always within the context.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from rlhf_ray.config.environment import EnvironmentConfig
from rlhf_ray.environments.base import Environment, Message, Step
from rlhf_ray.environments.template import TurnRenderer
from rlhf_ray.types import NOT_SAMPLED, FinishReason, Rollout, RolloutRequest, Turn, turn_seed


@dataclass(frozen=True)
class Limits:
    """What an episode may not exceed."""

    turns: int
    """Of the policy."""
    observation_tokens: int
    """Of one answer of the environment."""
    context: int
    """Tokens of the prompt and all that follows."""

    @classmethod
    def of(cls, config: EnvironmentConfig | None, context: int) -> Limits:
        """Without an environment there is one turn, and nobody answers."""
        return cls(1, 0, context) if config is None else cls(config.max_turns, config.max_observation_tokens, context)


class ObservationTooLong(ValueError):
    """The environment said more than is allowed."""


@dataclass
class Episode:
    """What has been said so far."""

    request: RolloutRequest
    """Its prompt has what the environment said first."""
    environment: Environment | None = None
    """None: the episode is one turn."""
    rendered: str = ""
    """The conversation as text; not needed where nobody answers."""
    turns: list[Turn] = field(default_factory=list)
    _segments: list[Rollout] = field(default_factory=list)
    """The policy's turns and, between them, the environment's answers, each as token ids, log-probabilities, versions."""

    @property
    def next_request(self) -> RolloutRequest:
        """What an engine is asked for: the conversation's tokens, and the turn's own seed."""
        prompt_ids = np.concatenate([self.request.prompt.token_ids, *(part.token_ids for part in self._segments)])
        prompt = replace(self.request.prompt, token_ids=prompt_ids)
        return replace(self.request, prompt=prompt, seed=turn_seed(self.request.seed, len(self.turns)))

    def add(self, sampled: Rollout, step: Step, renderer: TurnRenderer, limits: Limits) -> Rollout | None:
        """Add the policy's next turn and the answer to it. The whole rollout, if this ends the episode.

        A turn that hit the token limit ends it, since it has no end that an answer could follow. An answer that leaves no
        room for another turn is not appended, and the episode ends by its length.

        Raises:
            ObservationTooLong, TemplateRefused: the answer cannot be used.
        """
        start = sum(len(part) for part in self._segments)
        self._segments.append(sampled)
        if self.environment is None:
            return self._finished(sampled.finish_reason)
        turn = Turn(start, start + len(sampled), renderer.text(sampled.token_ids), step.reward)
        before, self.turns = self._messages, [*self.turns, turn]
        if step.done or sampled.finish_reason == "length" or len(self.turns) == limits.turns:
            return self._finished(sampled.finish_reason)
        self.rendered, ids = renderer.continuation(
            self.rendered, before, turn.text, step.observation, int(sampled.token_ids[-1])
        )
        if len(ids) > limits.observation_tokens:
            raise ObservationTooLong(
                f"an answer has {len(ids)} tokens and environment.max_observation_tokens is {limits.observation_tokens}"
            )
        if len(self.request.prompt.token_ids) + turn.stop + len(ids) >= limits.context:
            return self._finished("length")
        self.turns[-1] = replace(turn, answer=tuple(step.observation))
        nothing = np.zeros(len(ids), dtype=np.float32)
        self._segments.append(
            Rollout(self.request, ids, nothing, np.full(len(ids), NOT_SAMPLED, dtype=np.int32), "stop")
        )
        return None

    @property
    def _messages(self) -> tuple[Message, ...]:
        messages = list(self.request.prompt.messages)
        for turn in self.turns:
            messages += [{"role": "assistant", "content": turn.text}, *turn.answer]
        return tuple(messages)

    def _finished(self, reason: FinishReason) -> Rollout:
        columns = ("token_ids", "logprobs", "versions")
        joined = (np.concatenate([getattr(part, name) for part in self._segments]) for name in columns)
        return Rollout(self.request, *joined, reason, tuple(self.turns))
