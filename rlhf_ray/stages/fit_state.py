"""Where a supervised stage stands: its step, the best model so far, and whether to go on. A pure state machine.

Invariant: the state after step N is a function of the held-out losses measured up to N, so a resumed stage stops where an
uninterrupted one does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from rlhf_ray.config.supervised import EarlyStoppingConfig


@dataclass(frozen=True)
class FitState:
    """After `step` optimizer steps."""

    step: int = 0
    best_step: int | None = None
    """After which the held-out loss was lowest; None: not measured yet."""
    best_loss: float = math.inf
    reference_loss: float = math.inf
    """Of the last measurement that counted as an improvement."""
    without_improvement: int = 0
    """Measurements since that one."""
    stopped: bool = False
    """No step follows."""

    def after(self, step: int) -> FitState:
        """An optimizer step was taken."""
        return replace(self, step=step)

    def measured(self, loss: float, stopping: EarlyStoppingConfig | None) -> FitState:
        """The held-out loss was measured. Any lower one is the best; by how much matters for stopping only."""
        state = self
        if loss < self.best_loss:
            state = replace(state, best_step=self.step, best_loss=loss)
        if loss < self.reference_loss - (stopping.min_improvement if stopping else 0.0):
            return replace(state, reference_loss=loss, without_improvement=0)
        without = self.without_improvement + 1
        return replace(
            state, without_improvement=without, stopped=stopping is not None and without >= stopping.patience
        )
