"""The one flow of data: a `Prompt` becomes a `Rollout`, is scored into an `Experience`, and is packed into a `Batch`.

Invariants: every object here is immutable; a rollout's identity is (run, prompt id, sample index) and its seed is a hash of
that, so that a lost rollout can be generated again, token for token; every token knows the policy version that sampled it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
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


@dataclass(frozen=True, eq=False)
class Rollout:
    """One sampled response. T is its length in tokens, the end-of-sequence token included."""

    request: RolloutRequest
    token_ids: np.ndarray
    """int32 [T]."""
    logprobs: np.ndarray
    """float32 [T], nats: log-probability of each sampled token under the engine that sampled it, after temperature."""
    versions: np.ndarray
    """int32 [T]: the policy version that sampled each token."""
    finish_reason: FinishReason

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def prompt(self) -> Prompt:
        return self.request.prompt

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class Score:
    """What a reward worker says of one rollout."""

    total: float
    """The scalar that the policy is trained on."""
    parts: dict[str, float]
    """The score of each source (`model`, a function's name), before its weight; for metrics and samples."""


@dataclass(frozen=True, eq=False)
class Experience:
    """A rollout with everything that other actors said of it."""

    rollout: Rollout
    score: Score
    reference_logprobs: np.ndarray | None
    """float32 [T], nats, of the frozen reference policy; None where no KL term needs it."""
    teacher_logprobs: np.ndarray | None = None
    """float32 [T], nats, of the teacher; None where none gives advantages."""

    @property
    def id(self) -> str:
        return self.rollout.id


def rollout_seed(run: str, prompt_id: str, sample_index: int) -> int:
    """A 63-bit seed from a rollout's identity; never from a stream, so that order and retries change nothing."""
    digest = hashlib.blake2b(f"{run}\0{prompt_id}\0{sample_index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
