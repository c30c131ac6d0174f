"""What a source of reward returns for a rollout: a finite number, or an error that says why there is none."""

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
    """A service gave no usable answer. The message says what happened and never contains a key."""


class UnreadableAnswer(ValueError):
    """A service answered, but not in the required form. `text` is the text that a judge wrote, if it wrote one."""

    def __init__(self, reason: str, text: str | None = None) -> None:
        super().__init__(reason)
        self.text = text


def scores_or_raise(answers: Sequence[float | RewardError]) -> np.ndarray:
    """The scores as float64 [n]. Raises the first RewardError among them."""
    for answer in answers:
        if isinstance(answer, RewardError):
            raise answer
    return np.asarray(answers, dtype=np.float64)


def check_scores(name: str, scores: np.ndarray, rollouts: Sequence[Rollout]) -> list[float | RewardError]:
    """Replace each score that is not finite by an error, and all of them if their number is wrong."""
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
    """The responses as text, without special tokens and surrounding white space."""
    texts = tokenizer.batch_decode([rollout.token_ids for rollout in rollouts], skip_special_tokens=True)
    return [text.strip() for text in texts]
