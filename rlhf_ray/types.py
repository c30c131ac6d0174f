"""The data of a run: a `Prompt` becomes a `Rollout`, is scored into an `Experience`, and is packed into a `Batch`.

Invariants: every object here is immutable. A rollout is identified by (run, prompt id, sample index), and its seed is a hash of
these, so a lost rollout can be generated again, token for token. Every token knows the policy version that sampled it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

PolicyVersion = int
"""Number of a policy: 0 is the one that training starts from, and each PPO step gives the rollout workers the next one."""

FinishReason = Literal["stop", "length"]
"""Why a response ended: `stop`, the model produced an end token; `length`, it reached the token limit."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """A conversation that the policy continues."""

    id: str
    """Unique within a run; the same when the run is resumed."""
    token_ids: np.ndarray
    """int32 [P], chat template applied."""
    messages: tuple[dict[str, str], ...]
    """The conversation so far, as `{"role", "content"}`."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Further fields of the data file's row; reward functions and environments read them."""


@dataclass(frozen=True)
class RolloutRequest:
    """One rollout to generate."""

    prompt: Prompt
    sample_index: int
    seed: int

    @property
    def id(self) -> str:
        """`<prompt id>/<sample index>`, unique within a run."""
        return f"{self.prompt.id}/{self.sample_index}"


@dataclass(frozen=True)
class Turn:
    """One turn of the policy in an episode, and the environment's answer to it."""

    start: int
    """Index of its first token in the rollout."""
    stop: int
    """Index after its last token."""
    text: str
    """The decoded tokens, without special tokens and surrounding white space."""
    reward: float = 0.0
    """The environment's reward for this turn."""
    observation: tuple[dict[str, str], ...] = ()
    """The environment's messages after this turn; their tokens stand before the next turn. Empty for the last turn."""


@dataclass(frozen=True, eq=False)
class Rollout:
    """What follows a prompt: one sampled response, or an episode of several turns with the environment's messages between them.

    T is its length in tokens, including end-of-sequence tokens.
    """

    request: RolloutRequest
    token_ids: np.ndarray
    """int32 [T], as they were sampled; the last token is sampled by the policy."""
    logprobs: np.ndarray
    """float32 [T], nats: log-probability of each token in the engine that sampled it, after temperature; 0 for the
    environment's tokens."""
    versions: np.ndarray
    """int32 [T]: the policy version that sampled each token; `NOT_SAMPLED` for the environment's tokens."""
    finish_reason: FinishReason
    """Why the last turn ended; `length` also if the context has no room for another turn."""
    turns: tuple[Turn, ...] = ()
    """The policy's turns in an environment; `()` without an environment, where the policy samples every token."""

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def prompt(self) -> Prompt:
        return self.request.prompt

    @property
    def sampled_mask(self) -> np.ndarray:
        """bool [T]: the tokens that the policy sampled."""
        mask = np.full(len(self), not self.turns)
        for turn in self.turns:
            mask[turn.start : turn.stop] = True
        return mask

    @property
    def sampled_count(self) -> int:
        """Number of tokens that the policy sampled."""
        return sum(turn.stop - turn.start for turn in self.turns) if self.turns else len(self)

    @property
    def final_turn(self) -> Rollout:
        """The last turn as a rollout of its own, whose prompt is everything before it: rewards are given for this."""
        if len(self.turns) < 2:
            return self
        start, messages = self.turns[-1].start, list(self.prompt.messages)
        for turn in self.turns[:-1]:
            messages += [{"role": "assistant", "content": turn.text}, *turn.observation]
        prompt_ids = np.concatenate([self.prompt.token_ids, self.token_ids[:start]])
        prompt = replace(self.prompt, token_ids=prompt_ids, messages=tuple(messages))
        return Rollout(
            replace(self.request, prompt=prompt), self.token_ids[start:], self.logprobs[start:], self.versions[start:],
            self.finish_reason,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.token_ids)


NOT_SAMPLED: PolicyVersion = -1
"""Version of a token that no policy sampled."""


@dataclass(frozen=True)
class Score:
    """The reward of one rollout."""

    total: float
    """The reward that the policy is trained on."""
    parts: dict[str, float]
    """The reward of each source (`model`, the name of a function, …) before its weight; for metrics and samples."""

    def with_turns(self, rollout: Rollout) -> Score:
        """This score plus the environment's rewards for the rollout's turns, which become a part named `environment`."""
        if not rollout.turns:
            return self
        reward = sum(turn.reward for turn in rollout.turns)
        return Score(self.total + reward, self.parts | {ENVIRONMENT: reward})


ENVIRONMENT = "environment"
"""Name of the environment's part of a score."""


@dataclass(frozen=True, eq=False)
class Experience:
    """A rollout with its score and the log-probabilities that other models give its tokens."""

    rollout: Rollout
    score: Score
    reference_logprobs: np.ndarray | None
    """float32 [`sampled_count`], nats: log-probabilities under the frozen reference policy; None if no KL term needs them."""
    teacher_logprobs: np.ndarray | None = None
    """float32 [`sampled_count`], nats: log-probabilities under the teacher; None if no teacher gives advantages."""

    @property
    def id(self) -> str:
        return self.rollout.id


def rollout_seed(run: str, prompt_id: str, sample_index: int) -> int:
    """A 63-bit seed: a hash of the rollout's identity, so it does not depend on order or retries."""
    digest = hashlib.blake2b(f"{run}\0{prompt_id}\0{sample_index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def turn_seed(seed: int, turn: int) -> int:
    """The seed of turn `turn` of a rollout: the rollout's own seed for turn 0, a hash of both for later turns."""
    return seed if turn == 0 else rollout_seed("turn", str(seed), turn)
