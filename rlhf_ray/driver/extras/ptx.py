"""Demonstrations beside rollouts in the policy's optimizer steps (PPO-ptx). Pure.

Invariants: which demonstrations a step learns from is a function of the seed and the number of the step, so a resumed run
goes on in the same order; every epoch visits each demonstration once; a demonstration's tokens have no part in the policy
loss, and a rollout's none in the cross-entropy.
"""

from __future__ import annotations

import numpy as np

from rlhf_ray.batch import Batch


class DemonstrationSource:
    """An endless, addressable sequence of demonstrations."""

    def __init__(self, demonstrations: Batch, seed: int) -> None:
        """`demonstrations`: whole dialogues, the assistant's tokens as targets; at least one."""
        self.demonstrations, self.seed = demonstrations, seed

    def take(self, start: int, count: int) -> Batch:
        """Demonstrations `start` to `start + count − 1` of the run."""
        epochs, places = np.divmod(np.arange(start, start + count), len(self.demonstrations))
        orders = {epoch: self._order(int(epoch)) for epoch in np.unique(epochs)}
        return self.demonstrations.select([orders[epoch][place] for epoch, place in zip(epochs, places, strict=True)])

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch, len(self.demonstrations)]).permutation(len(self.demonstrations))


def per_step(share: float, rollouts: int) -> int:
    """Demonstrations of an optimizer step on so many rollouts, at least one."""
    return max(1, round(share * rollouts))


def with_demonstrations(minibatch: Batch, demonstrations: Batch, coefficient: float) -> Batch:
    """Both in one batch: `Σ weights · policy loss + Σ ptx_weights · cross-entropy`, the latter weighing γ per token in all."""
    rollout_tokens, tokens = int(minibatch.target_mask.sum()), int(demonstrations.target_mask.sum())
    own = minibatch.with_columns(ptx_weights=np.zeros(rollout_tokens, dtype=np.float32))
    return own.joined(demonstrations.with_columns(ptx_weights=np.full(tokens, coefficient / tokens, dtype=np.float32)))
