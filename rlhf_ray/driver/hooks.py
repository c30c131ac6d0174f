"""Hooks: what a run does in its PPO loop besides the algorithm.

`driver/extras/` has those that a config asks for; `rlhf_ray.run(config, on_step=...)` adds one for a function of the user.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from rlhf_ray.batch import Batch
from rlhf_ray.driver.training_batch import TrainingBatch
from rlhf_ray.telemetry.timing import PhaseTimer
from rlhf_ray.types import Experience


class LoopHook:
    """Base class: every method does nothing. The methods are listed in the order in which a step calls them.

    Steps are numbered from 1; `steps_done` is the number of complete steps, one less than that of the current step.
    """

    phase: str | None = None
    """The phase of a step (metric `time/<phase>_s`) that the hook's time is counted in; None: it is not counted."""

    async def start(self, steps_done: int) -> None:
        """Training starts or resumes; the rollout workers have the policy of step `steps_done`."""

    async def reward(self, experiences: Sequence[Experience], steps_done: int) -> Sequence[Experience]:
        """Change the scores of a batch before advantages are computed from them."""
        return experiences

    def select(self, batch: TrainingBatch) -> TrainingBatch:
        """Change which sequences of a batch are trained on."""
        return batch

    def extend_minibatch(self, minibatch: Batch, optimizer_steps_done: int) -> Batch:
        """Add sequences to a minibatch of the policy."""
        return minibatch

    async def during_update(self, experiences: Sequence[Experience], steps_done: int) -> Mapping[str, float]:
        """Work while the policy and the value model are updated; returns metrics of the step."""
        return {}

    async def after_sync(self, step: int) -> Mapping[str, float]:
        """The rollout workers have the policy of step `step`, and no rollouts run yet; returns metrics of the step."""
        return {}

    async def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step is recorded, and saved if a checkpoint was due."""

    async def save(self, folder: Path) -> None:
        """Write the hook's state into a checkpoint. The checkpointer saves the learners of all roles itself."""

    async def restore(self, folder: Path) -> None:
        """Continue from what `save` wrote."""

    async def close(self) -> None:
        """Training ended, also by an error."""


class StepCallback(LoopHook):
    """Calls a function with the number and the metrics of every step."""

    def __init__(self, function: Callable[[int, Mapping[str, float]], None]) -> None:
        self.function = function

    async def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.function(step, metrics)


class HookChain(LoopHook):
    """Several hooks as one: each method calls them in their order, and merges their metrics."""

    def __init__(self, hooks: Iterable[LoopHook], timer: PhaseTimer | None = None) -> None:
        self.hooks, self.timer = tuple(hooks), timer

    async def start(self, steps_done: int) -> None:
        for hook in self.hooks:
            await hook.start(steps_done)

    async def reward(self, experiences: Sequence[Experience], steps_done: int) -> Sequence[Experience]:
        for hook in self.hooks:
            with self._timed(hook):
                experiences = await hook.reward(experiences, steps_done)
        return experiences

    def select(self, batch: TrainingBatch) -> TrainingBatch:
        for hook in self.hooks:
            batch = hook.select(batch)
        return batch

    def extend_minibatch(self, minibatch: Batch, optimizer_steps_done: int) -> Batch:
        for hook in self.hooks:
            minibatch = hook.extend_minibatch(minibatch, optimizer_steps_done)
        return minibatch

    async def during_update(self, experiences: Sequence[Experience], steps_done: int) -> dict[str, float]:
        """All hooks at the same time."""

        async def timed(hook: LoopHook) -> Mapping[str, float]:
            with self._timed(hook):
                return await hook.during_update(experiences, steps_done)

        parts = await asyncio.gather(*map(timed, self.hooks))
        return {name: value for metrics in parts for name, value in metrics.items()}

    async def after_sync(self, step: int) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for hook in self.hooks:
            with self._timed(hook):
                metrics |= await hook.after_sync(step)
        return metrics

    async def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        for hook in self.hooks:
            await hook.on_step(step, metrics)

    async def save(self, folder: Path) -> None:
        for hook in self.hooks:
            await hook.save(folder)

    async def restore(self, folder: Path) -> None:
        for hook in self.hooks:
            await hook.restore(folder)

    async def close(self) -> None:
        for hook in self.hooks:
            await hook.close()

    def _timed(self, hook: LoopHook) -> AbstractContextManager[None]:
        return nullcontext() if self.timer is None or hook.phase is None else self.timer(hook.phase)
