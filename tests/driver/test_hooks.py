"""Hooks in a chain: their order, their metrics, and whose time is counted where."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlhf_ray.batch import Batch, pack_sequences
from rlhf_ray.driver.hooks import HookChain, LoopHook, StepCallback
from rlhf_ray.driver.training_batch import TrainingBatch, collate
from rlhf_ray.telemetry.timing import PhaseTimer
from rlhf_ray.types import Experience


class Recorder(LoopHook):
    """Writes down its calls."""

    def __init__(self, name: str, calls: list[str], phase: str | None = None) -> None:
        self.name, self.calls, self.phase = name, calls, phase

    async def start(self, steps_done: int) -> None:
        self.calls.append(f"{self.name} start {steps_done}")

    async def reward(self, experiences: Sequence[Experience], steps_done: int) -> Sequence[Experience]:
        return [*experiences, *experiences[:1]]

    def extend_minibatch(self, minibatch: Batch, optimizer_steps_done: int) -> Batch:
        return minibatch.joined(minibatch.select([0]))

    async def during_update(self, experiences: Sequence[Experience], steps_done: int) -> Mapping[str, float]:
        return {f"{self.name}/during": float(steps_done)}

    async def after_sync(self, step: int) -> Mapping[str, float]:
        return {f"{self.name}/after": float(step)}

    async def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.calls.append(f"{self.name} step {step} {dict(metrics)}")

    async def save(self, folder: Path) -> None:
        self.calls.append(f"{self.name} save {folder}")

    async def restore(self, folder: Path) -> None:
        self.calls.append(f"{self.name} restore {folder}")

    async def close(self) -> None:
        self.calls.append(f"{self.name} close")


def test_a_chain_calls_its_hooks_in_order(experience):
    calls: list[str] = []
    timer = PhaseTimer()
    chain = HookChain([Recorder("a", calls, "judging"), Recorder("b", calls)], timer)

    async def step() -> None:
        await chain.start(3)
        assert len(await chain.reward([experience("p", 0)], 3)) == 3, "each added one to what it was given"
        batch = pack_sequences([[1, 2], [3, 4]], [[False, True]] * 2)
        assert chain.extend_minibatch(batch, 0).token_ids.tolist() == [1, 2, 3, 4, 1, 2, 1, 2], (
            "rollouts, then what each adds"
        )
        assert await chain.during_update([], 3) == {"a/during": 3.0, "b/during": 3.0}
        assert await chain.after_sync(4) == {"a/after": 4.0, "b/after": 4.0}
        await chain.on_step(4, {"loss": 0.5})
        await chain.save(Path("x"))
        await chain.restore(Path("x"))
        await chain.close()

    asyncio.run(step())
    events = ["start 3", "step 4 {'loss': 0.5}", "save x", "restore x", "close"]
    assert calls == [f"{name} {event}" for event in events for name in ("a", "b")]
    assert "time/judging_s" in timer.lap()


def test_a_hook_that_does_nothing_changes_nothing(experience):
    experiences = [experience("p", 0)]
    batch = TrainingBatch(collate(experiences), None, 0.0, trained=[True])
    hook = LoopHook()

    async def step() -> None:
        assert await hook.reward(experiences, 0) is experiences
        assert await hook.during_update(experiences, 0) == await hook.after_sync(1) == {}
        await hook.on_step(1, {})

    asyncio.run(step())
    assert hook.select(batch) is batch and hook.extend_minibatch(batch.batch, 0) is batch.batch


def test_a_users_function_is_called_with_step_and_metrics():
    seen: list[tuple[int, Mapping[str, float]]] = []
    asyncio.run(HookChain([StepCallback(lambda step, metrics: seen.append((step, metrics)))]).on_step(2, {"loss": 1.0}))
    assert seen == [(2, {"loss": 1.0})]
