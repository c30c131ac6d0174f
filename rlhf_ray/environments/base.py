"""The interface of an environment, and the checks of what it returns.

Invariant: everything an environment returns is checked before it is used. A result that cannot be used is an error that names
the environment and the rollout; it never becomes a reward of zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from rlhf_ray.errors import InputError
from rlhf_ray.types import Prompt

Message = dict[str, str]
Observation = str | Sequence[Message]
"""What the policy reads next: messages as `{"role", "content"}`, or a text, which is one message of the user."""


@dataclass(frozen=True)
class Step:
    """The environment's answer to one turn of the policy."""

    observation: Observation = ()
    """What the policy reads next; ignored if the episode ends."""
    reward: float = 0.0
    """Reward of this turn; it is given to the turn's last token."""
    done: bool = False
    """Whether the episode ends."""


class Environment(Protocol):
    """Answers the policy in one episode. Each episode has its own object, which is called from one thread at a time."""

    def reset(self, prompt: Prompt, seed: int) -> Observation:
        """Begin an episode. What is returned is appended to the prompt before the policy's first turn; `()` appends nothing.

        Args:
            prompt: the prompt, with the metadata of the data file.
            seed: seed for everything that is random here, so that the episode can be repeated, token for token.
        """

    def step(self, response: str) -> Step:
        """Answer a turn of the policy; `response` is its text, without special tokens and surrounding white space."""


class EnvironmentFailed(InputError, RuntimeError):
    """An environment raised, was too slow, or returned something that cannot be used."""

    def __init__(self, environment: str, reason: str, rollout_id: str) -> None:
        super().__init__(environment, reason, rollout_id)
        self.environment, self.reason, self.rollout_id = environment, reason, rollout_id

    @property
    def prompt_id(self) -> str:
        """The prompt's part of the rollout's id."""
        return self.rollout_id.rpartition("/")[0]

    def __str__(self) -> str:
        return f"environment {self.environment!r}: {self.reason} (rollout {self.rollout_id})"


def messages_of(observation: object) -> tuple[Message, ...]:
    """An observation as messages.

    Raises:
        ValueError: the observation is neither a text nor messages, or it has a message of the assistant.
    """
    if isinstance(observation, str):
        return ({"role": "user", "content": observation},)
    if not isinstance(observation, Sequence):
        raise ValueError(f"an observation is a text or a list of messages; got {observation!r:.80}")
    for message in observation:
        fits = isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        if not fits or message["role"] == "assistant":
            raise ValueError(
                f'a message of an observation is {{"role", "content"}} and not of the assistant; got {message!r:.80}'
            )
    return tuple(dict(message) for message in observation)


def checked_step(step: object) -> Step:
    """A step whose observation is messages.

    Raises:
        ValueError: it is not a `Step`, its reward is not a finite number, or it has no observation although it is not done.
    """
    if not isinstance(step, Step):
        raise ValueError(f"step returned {step!r:.80}; expected a rlhf_ray.environments.Step")
    if isinstance(step.reward, bool) or not isinstance(step.reward, int | float) or not math.isfinite(step.reward):
        raise ValueError(f"step returned the reward {step.reward!r:.80}; expected a finite number")
    messages = messages_of(step.observation)
    if not messages and not step.done:
        raise ValueError("step returned no observation although the episode is not done")
    return Step(messages, float(step.reward), bool(step.done))
