"""What a source of reward says of rollouts: a finite number for each, or an error."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_ray.errors import InputError
from rlhf_ray.types import Rollout


class RewardError(InputError, RuntimeError):
    """A source of reward failed on some rollouts."""

    def __init__(self, source: str, reason: str, rollout_ids: Sequence[str]) -> None:
        super().__init__(source, reason, tuple(rollout_ids))
        self.source, self.reason, self.rollout_ids = source, reason, tuple(rollout_ids)

    def __str__(self) -> str:
        shown = ", ".join(self.rollout_ids[:3]) + (", …" if len(self.rollout_ids) > 3 else "")
        return f"reward source {self.source!r}: {self.reason} (rollouts {shown})"


class ServiceError(InputError, RuntimeError):
    """A service gave no answer that can be used; the message says what it did instead, without any key."""


class Unreadable(ValueError):
    """An answer that arrived and does not say what was asked for. `text` is what a judge wrote, where there is a text."""

    def __init__(self, reason: str, text: str | None = None) -> None:
        super().__init__(reason)
        self.text = text


def numbers(answers: Sequence[float | RewardError]) -> np.ndarray:
    """float64 [n]. Raises the first RewardError among the answers."""
    for answer in answers:
        if isinstance(answer, RewardError):
            raise answer
    return np.asarray(answers, dtype=np.float64)


def checked(name: str, scores: np.ndarray, rollouts: Sequence[Rollout]) -> list[float | RewardError]:
    """Scores as answers: an error in the place of one that is not finite, and of all where their number is wrong."""
    if scores.shape != (len(rollouts),):
        reason = f"returned shape {scores.shape} for {len(rollouts)} responses; one number for each is needed"
        return [RewardError(name, reason, [r.id for r in rollouts])] * len(rollouts)
    bad = ~np.isfinite(scores)
    if not bad.any():
        return scores.tolist()
    reason = f"returned {scores[bad][0]} for {int(bad.sum())} of {len(rollouts)} responses; scores must be finite"
    error = RewardError(name, reason, [r.id for r, b in zip(rollouts, bad, strict=True) if b])
    return [error if b else float(score) for score, b in zip(scores, bad, strict=True)]


def response_texts(tokenizer: PreTrainedTokenizerBase, rollouts: Sequence[Rollout]) -> list[str]:
    """The responses, without special tokens and without space around them."""
    texts = tokenizer.batch_decode([rollout.token_ids for rollout in rollouts], skip_special_tokens=True)
    return [text.strip() for text in texts]
