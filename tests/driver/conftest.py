"""Rollouts and experiences made by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from rlhf_ray.types import Experience, Prompt, Rollout, RolloutRequest, Score, rollout_seed


def make_experience(
    prompt_id: str, sample: int, length: int = 3, score: float = 0.0, finish: str = "stop", reference: bool = True
) -> Experience:
    """Random tokens and log-probabilities that are a function of the identity."""
    seed = rollout_seed("test", prompt_id, sample)
    generator = np.random.default_rng(seed)
    prompt = Prompt(prompt_id, generator.integers(3, 50, 4, dtype=np.int32), ({"role": "user", "content": prompt_id},))
    rollout = Rollout(
        RolloutRequest(prompt, sample, seed),
        generator.integers(3, 50, length, dtype=np.int32),
        generator.normal(-2, 1, length).astype(np.float32),
        np.zeros(length, dtype=np.int32),
        finish,
    )
    logprobs = generator.normal(-2, 1, length).astype(np.float32) if reference else None
    return Experience(rollout, Score(score, {"model": score}), logprobs)


@pytest.fixture(scope="session")
def experience() -> Callable[..., Experience]:
    """`make_experience`, for tests."""
    return make_experience
