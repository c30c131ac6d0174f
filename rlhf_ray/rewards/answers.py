"""What a source of reward says of rollouts: a finite number for each, or an error."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlhf_ray.rewards.errors import RewardError
from rlhf_ray.types import Rollout


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
