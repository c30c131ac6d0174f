"""What an environment is, and what is asked of its answers.

Invariant: whatever an environment answers is checked before it is used; an answer that cannot be used is an error with the
environment's name and the rollout's, never a silent zero.
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
"""What the environment says: turns as `{"role", "content"}`; a text is one turn of the user."""


@dataclass(frozen=True)
class Step:
    """An environment's answer to one turn of the policy."""

    observation: Observation = ()
    """What the policy reads next; not shown to it where the episode is over."""
    reward: float = 0.0
    """For this turn; it is placed at the turn's last token."""
    done: bool = False
    """The episode is over."""


class Environment(Protocol):
    """The other side of one episode. Each episode has an object of its own, called from one thread at a time."""

    def reset(self, prompt: Prompt, seed: int) -> Observation:
        """Begin an episode. What is returned stands behind the prompt's messages, before the policy's first turn; `()`: nothing.

        Args:
            prompt: with the metadata of the data file.
            seed: for whatever is random here, so that the episode can be had again, token for token.
        """

    def step(self, response: str) -> Step:
        """Answer a turn of the policy; `response` is its text, without special tokens and space around it."""


class EnvironmentFailed(InputError, RuntimeError):
    """An environment raised, was too slow, or answered what cannot be used."""

    def __init__(self, environment: str, reason: str, rollout_id: str) -> None:
        super().__init__(environment, reason, rollout_id)
        self.environment, self.reason, self.rollout_id = environment, reason, rollout_id

    @property
    def prompt_id(self) -> str:
        """A rollout's id is its prompt's and a number."""
        return self.rollout_id.rpartition("/")[0]

    def __str__(self) -> str:
        return f"environment {self.environment!r}: {self.reason} (rollout {self.rollout_id})"


def messages_of(observation: object) -> tuple[Message, ...]:
    """An observation as turns.

    Raises:
        ValueError: it is neither text nor turns of others than the assistant.
    """
    if isinstance(observation, str):
        return ({"role": "user", "content": observation},)
    if not isinstance(observation, Sequence):
        raise ValueError(f"an observation is text or a list of messages, not {observation!r:.80}")
    for turn in observation:
        fits = isinstance(turn, Mapping) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        if not fits or turn["role"] == "assistant":
            raise ValueError(
                f'a message of an observation is {{"role", "content"}} of somebody other than the assistant, not {turn!r:.80}'
            )
    return tuple(dict(turn) for turn in observation)


def checked_step(step: object) -> Step:
    """A step with its observation as turns.

    Raises:
        ValueError: no `Step`; a reward that is no finite number; nothing said although the episode goes on.
    """
    if not isinstance(step, Step):
        raise ValueError(f"step returned {step!r:.80}; expected a rlhf_ray.environments.Step")
    if isinstance(step.reward, bool) or not isinstance(step.reward, int | float) or not math.isfinite(step.reward):
        raise ValueError(f"step returned the reward {step.reward!r:.80}; expected a finite number")
    messages = messages_of(step.observation)
    if not messages and not step.done:
        raise ValueError("step returned no observation although the episode is not done")
    return Step(messages, float(step.reward), bool(step.done))
