"""Phases are wall time: overlap counts once, a phase across steps is split between them, idle is what no phase
covers."""

from __future__ import annotations

import asyncio

import pytest

from rlhf_ray.telemetry.timing import PhaseTimer


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_phases_accumulate_within_a_step_and_reset_after_it():
    clock = Clock()
    timer = PhaseTimer(clock=clock)
    for _ in range(2):
        with timer("rollout"):
            clock.now += 1.5
        with timer("update"):
            clock.now += 0.5
    clock.now += 1.0
    assert timer.lap() == {"time/step_s": 5.0, "time/rollout_s": 3.0, "time/update_s": 1.0}
    with timer("update"):
        clock.now += 2.0
    assert timer.lap() == {"time/step_s": 2.0, "time/rollout_s": 0.0, "time/update_s": 2.0}


def test_concurrent_coroutines_in_one_phase_count_once():
    clock = Clock()
    timer = PhaseTimer(clock=clock)

    async def generate(entered: asyncio.Event, leave: asyncio.Event) -> None:
        with timer("rollout"):
            entered.set()
            await leave.wait()

    async def step() -> None:
        events = [(asyncio.Event(), asyncio.Event()) for _ in range(3)]
        tasks = [asyncio.create_task(generate(*pair)) for pair in events]
        for entered, leave in events:
            await entered.wait()
            clock.now += 1.0
            leave.set()
        await asyncio.gather(*tasks)

    asyncio.run(step())
    assert timer.lap()["time/rollout_s"] == 3.0


def test_phase_that_is_open_when_the_step_ends_is_split():
    clock = Clock()
    timer = PhaseTimer({"rollout": {"rollout"}}, clock=clock)
    with timer("rollout"):
        clock.now += 3.0
        first = timer.lap()
        clock.now += 1.0
    clock.now += 1.0
    second = timer.lap()
    assert (first["time/rollout_s"], second["time/rollout_s"]) == (3.0, 1.0)
    assert (first["idle/rollout"], second["idle/rollout"]) == (0.0, 0.5)


def test_role_is_busy_while_any_of_its_phases_is():
    clock = Clock()
    timer = PhaseTimer({"learner": ("old_logprobs", "update"), "rollout": ("rollout",)}, clock=clock)
    with timer("rollout"):
        clock.now += 1.0
        with timer("old_logprobs"):
            clock.now += 1.0
            with timer("update"):
                clock.now += 1.0
    clock.now += 1.0
    figures = timer.lap()
    assert figures["idle/learner"] == pytest.approx(0.5)
    assert figures["idle/rollout"] == pytest.approx(0.25)


def test_phase_that_fails_is_counted_and_closed():
    clock = Clock()
    timer = PhaseTimer(clock=clock)
    with pytest.raises(RuntimeError), timer("rollout"):
        clock.now += 2.0
        raise RuntimeError
    clock.now += 5.0
    assert timer.lap()["time/rollout_s"] == 2.0
