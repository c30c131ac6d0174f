"""Which prompts are sampled, in which order, with which seeds. Pure; the state is one number.

Invariants: the k-th group of a run has the same prompt, id and seeds in every attempt at the run; an epoch visits every prompt
once, in an order that the run's seed decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rlhf_ray.types import Prompt, RolloutRequest, rollout_seed


class PromptSource:
    """An endless, addressable sequence of groups of requests."""

    def __init__(self, prompts: Sequence[Prompt], run: str, seed: int, samples_per_prompt: int) -> None:
        if not prompts:
            raise ValueError("there are no prompts to sample; see data.prompts and data.max_prompt_tokens")
        self.prompts, self.run, self.seed, self.samples_per_prompt = prompts, run, seed, samples_per_prompt
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, dtype=np.int64))

    def group(self, index: int) -> list[RolloutRequest]:
        """The requests of group `index` (from 0): all samples of one prompt."""
        epoch, position = divmod(index, len(self.prompts))
        prompt = self.prompts[int(self._permutation(epoch)[position])]
        prompt = replace(prompt, id=f"{epoch}/{prompt.id}")
        return [
            RolloutRequest(prompt, sample, rollout_seed(f"{self.run}:{self.seed}", prompt.id, sample))
            for sample in range(self.samples_per_prompt)
        ]

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.prompts)))
        return self._order[1]
