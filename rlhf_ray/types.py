"""The one flow of data: a `Prompt` becomes a `Rollout`, is scored into an `Experience`, and is packed into a `Batch`.

Invariants: every object here is immutable; a rollout's identity is (run, prompt id, sample index) and its seed is a hash of
that, so that a lost rollout can be generated again, token for token; every token knows the policy version that sampled it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

PolicyVersion = int
"""Number of optimizer updates of the policy behind a set of weights; 0 is the policy that training starts from."""

FinishReason = Literal["stop", "length"]
"""Why a response ended: the model said so (EOS or a stop token), or the token limit was reached."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """What the policy is asked."""

    id: str
    """Unique within a run, and the same in every attempt at it."""
    token_ids: np.ndarray
    """int32 [P], chat template applied."""
    messages: tuple[dict[str, str], ...]
    """The conversation so far, as `{"role", "content"}`."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Whatever the data file said beside the conversation; reward functions read it."""


@dataclass(frozen=True)
class RolloutRequest:
    """One response to sample: what a rollout worker is sent."""

    prompt: Prompt
    sample_index: int
    seed: int

    @property
    def id(self) -> str:
        """`<prompt id>/<sample index>`, unique within a run."""
        return f"{self.prompt.id}/{self.sample_index}"


@dataclass(frozen=True)
class Turn:
    """What the policy said at one time in an episode, and what came of it."""

    start: int
    """Its first token's place in the rollout."""
    stop: int
    """The place behind its last one."""
    text: str
    """Without special tokens and space around it."""
    reward: float = 0.0
    """The environment's, for this turn."""
    answer: tuple[dict[str, str], ...] = ()
    """What the environment said next; its tokens stand between this turn and the next. Nothing behind the last turn."""


@dataclass(frozen=True, eq=False)
class Rollout:
    """What follows a prompt: one sampled response, or the turns of an episode with what an environment said between them.

    T is its length in tokens, the end-of-sequence tokens included.
    """

    request: RolloutRequest
    token_ids: np.ndarray
    """int32 [T], as they were sampled; the last is the policy's."""
    logprobs: np.ndarray
    """float32 [T], nats: log-probability of each sampled token under the engine that sampled it, after temperature; 0 where
    the environment spoke."""
    versions: np.ndarray
    """int32 [T]: the policy version that sampled each token; `NOT_SAMPLED` where the environment spoke."""
    finish_reason: FinishReason
    """Of the last turn; `length`, too, where the context had no room for another."""
    turns: tuple[Turn, ...] = ()
    """The policy's turns in an environment. Without one, `()`: every token is the policy's."""

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def prompt(self) -> Prompt:
        return self.request.prompt

    @property
    def chosen(self) -> np.ndarray:
        """bool [T]: tokens that the policy chose."""
        mask = np.full(len(self), not self.turns)
        for turn in self.turns:
            mask[turn.start : turn.stop] = True
        return mask

    @property
    def chosen_count(self) -> int:
        """Number of tokens that the policy chose."""
        return sum(turn.stop - turn.start for turn in self.turns) if self.turns else len(self)

    @property
    def final_turn(self) -> Rollout:
        """The last turn as a response of its own, to a prompt that goes up to it: what somebody who reads it judges."""
        if len(self.turns) < 2:
            return self
        start, messages = self.turns[-1].start, list(self.prompt.messages)
        for turn in self.turns[:-1]:
            messages += [{"role": "assistant", "content": turn.text}, *turn.answer]
        prompt_ids = np.concatenate([self.prompt.token_ids, self.token_ids[:start]])
        prompt = replace(self.prompt, token_ids=prompt_ids, messages=tuple(messages))
        return Rollout(
            replace(self.request, prompt=prompt), self.token_ids[start:], self.logprobs[start:], self.versions[start:],
            self.finish_reason,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.token_ids)


NOT_SAMPLED: PolicyVersion = -1
"""Version of a token that no policy chose."""


@dataclass(frozen=True)
class Score:
    """What a reward worker says of one rollout."""

    total: float
    """The scalar that the policy is trained on."""
    parts: dict[str, float]
    """The score of each source (`model`, a function's name), before its weight; for metrics and samples."""

    def with_turns(self, rollout: Rollout) -> Score:
        """The same with the rewards that an environment gave for its turns, as a part of their own."""
        if not rollout.turns:
            return self
        reward = sum(turn.reward for turn in rollout.turns)
        return Score(self.total + reward, self.parts | {ENVIRONMENT: reward})


ENVIRONMENT = "environment"
"""Name of the part of a score that an environment gave."""


@dataclass(frozen=True, eq=False)
class Experience:
    """A rollout with everything that other actors said of it."""

    rollout: Rollout
    score: Score
    reference_logprobs: np.ndarray | None
    """float32, nats, of the frozen reference policy, one for each token that the policy chose; None where no KL needs it."""
    teacher_logprobs: np.ndarray | None = None
    """The same of the teacher; None where none gives advantages."""

    @property
    def id(self) -> str:
        return self.rollout.id


def rollout_seed(run: str, prompt_id: str, sample_index: int) -> int:
    """A 63-bit seed from a rollout's identity; never from a stream, so that order and retries change nothing."""
    digest = hashlib.blake2b(f"{run}\0{prompt_id}\0{sample_index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def turn_seed(seed: int, turn: int) -> int:
    """The seed of a rollout's `turn`-th turn (from 0): that of the rollout for the first, a hash of both for others."""
    return seed if turn == 0 else rollout_seed("turn", str(seed), turn)
