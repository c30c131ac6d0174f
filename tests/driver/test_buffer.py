"""The buffer between streaming and training: the same batches in any order of arrival, and no deadlock."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from rlhf_ray.algorithms.kl import FixedKL
from rlhf_ray.driver.buffer import Admission, ExperienceBuffer, TooManyDrops
from rlhf_ray.driver.checkpointer import TrainingState

GROUPS, SAMPLES, BATCHES = 3, 2, 4


def run(coroutine: Coroutine) -> Any:
    """Run a test with a deadline, so that a deadlock is a failure."""
    return asyncio.run(asyncio.wait_for(coroutine, 20))


async def train_with(
    experience: Callable, seed: int, staleness: int, fails: Callable[[str, int], bool] = lambda prompt, sample: False
) -> list[list[str]]:
    """Ids of the batches that training takes while groups arrive in an order that `seed` decides."""
    buffer = ExperienceBuffer(Admission(GROUPS, staleness), SAMPLES)
    shuffled = random.Random(seed)

    async def produce(index: int, sample: int) -> None:
        for _ in range(shuffled.randrange(12)):
            await asyncio.sleep(0)
        if fails(f"p{index}", sample):
            await buffer.drop(f"p{index}")
        else:
            await buffer.put(experience(f"p{index}", sample))

    async def stream() -> None:
        async with asyncio.TaskGroup() as tasks:
            while True:
                for index in await buffer.admit():
                    buffer.expect(f"p{index}", index)
                    for sample in range(SAMPLES):
                        tasks.create_task(produce(index, sample))

    streaming = asyncio.create_task(stream())
    batches = []
    for version in range(1, BATCHES + 1):
        batches.append([item.id for item in await buffer.take(GROUPS)])
        await buffer.advance_version(version)
    streaming.cancel()
    await asyncio.gather(streaming, return_exceptions=True)
    return batches


def ids(first: int, last: int) -> list[str]:
    return [f"p{index}/{sample}" for index in range(first, last) for sample in range(SAMPLES)]


@pytest.mark.parametrize("seed", range(8))
def test_synchronous_batches_do_not_depend_on_the_order_of_arrival(experience, seed):
    batches = run(train_with(experience, seed, staleness=0))
    assert batches == [ids(number * GROUPS, (number + 1) * GROUPS) for number in range(BATCHES)]


@pytest.mark.parametrize("seed", range(4))
def test_with_staleness_no_rollout_is_lost_or_taken_twice(experience, seed):
    taken = [rollout for batch in run(train_with(experience, seed, staleness=2)) for rollout in batch]
    assert len(taken) == len(set(taken)) == BATCHES * GROUPS * SAMPLES
    # Nothing that was admitted later than staleness allows.
    assert max(int(rollout.split("/")[0][1:]) for rollout in taken) < (BATCHES + 2) * GROUPS


@pytest.mark.parametrize("seed", range(4))
def test_a_dropped_group_is_replaced_by_the_next_prompt(experience, seed):
    batches = run(
        train_with(experience, seed, staleness=0, fails=lambda prompt, sample: prompt in ("p1", "p4") and sample)
    )
    assert batches[0] == ids(0, 1) + ids(2, 4), "p1 is dropped, p3 takes its place"
    assert batches[1] == ids(5, 8)
    assert all(len(batch) == GROUPS * SAMPLES for batch in batches)


def test_a_group_is_dropped_whole_and_reported_once(experience):
    async def scenario() -> None:
        buffer = ExperienceBuffer(Admission(1), samples_per_prompt=3)
        for index in await buffer.admit():
            buffer.expect(f"p{index}", index)
        await buffer.put(experience("p0", 0))
        assert await buffer.drop("p0")
        assert not await buffer.drop("p0")
        assert list(await buffer.admit()) == [1]
        buffer.expect("p1", 1)
        for sample in range(3):
            await buffer.put(experience("p1", sample))
        assert [item.id for item in await buffer.take(1)] == ["p1/0", "p1/1", "p1/2"]

    run(scenario())


@pytest.mark.parametrize("attempts", [2, 3])
def test_batches_with_replaced_groups_do_not_depend_on_the_order_of_arrival(experience, attempts):
    """Most groups have no signal, so the attempts run out: the same groups are replaced and taken in any order."""
    outcomes = [run(train_on_signal(experience, seed, attempts)) for seed in range(8)]
    assert all(outcome == outcomes[0] for outcome in outcomes)
    batches, replaced, cursor = outcomes[0]
    assert replaced and all(len(batch) == GROUPS * SAMPLES for batch in batches)
    taken = {rollout.split("/")[0] for batch in batches for rollout in batch}
    assert not taken & replaced and len(taken | replaced) == cursor, "every group is trained or replaced"
    assert any(int(prompt[1:]) % 5 for prompt in taken), "what came after the last attempt is trained as it is"


async def train_on_signal(experience: Callable, seed: int, attempts: int) -> tuple[list[list[str]], set[str], int]:
    """(batches, prompts that were replaced, groups admitted) where only every fifth group has a signal."""

    def has_signal(group) -> bool:
        return int(group[0].rollout.prompt.id[1:]) % 5 == 0

    buffer = ExperienceBuffer(Admission(GROUPS, attempts=attempts), SAMPLES, has_signal)
    shuffled, replaced, batches = random.Random(seed), set(), []

    async def produce(index: int, sample: int) -> None:
        for _ in range(shuffled.randrange(12)):
            await asyncio.sleep(0)
        if not await buffer.put(experience(f"p{index}", sample)):
            replaced.add(f"p{index}")

    async def stream() -> None:
        async with asyncio.TaskGroup() as tasks:
            while True:
                for index in await buffer.admit():
                    buffer.expect(f"p{index}", index)
                    for sample in range(SAMPLES):
                        tasks.create_task(produce(index, sample))

    streaming = asyncio.create_task(stream())
    for version in range(1, BATCHES + 1):
        batches.append([item.id for item in await buffer.take(GROUPS)])
        assert buffer.unfinished == ()
        cursor = buffer.admission.next_group
        await buffer.advance_version(version)
    streaming.cancel()
    await asyncio.gather(streaming, return_exceptions=True)
    return batches, replaced, cursor


def test_unfinished_groups_are_those_neither_taken_nor_dropped(experience):
    async def scenario() -> None:
        buffer = ExperienceBuffer(Admission(2, staleness=1), samples_per_prompt=1)
        for index in await buffer.admit():
            buffer.expect(f"p{index}", index)
        assert buffer.unfinished == (0, 1, 2, 3)
        for index in (3, 1):
            await buffer.put(experience(f"p{index}", 0))
        await buffer.drop("p0")
        assert buffer.unfinished == (1, 2, 3)
        assert [item.id for item in await buffer.take(2)] == ["p1/0", "p3/0"]
        assert buffer.unfinished == (2,)
        # A run that goes on from here generates group 2 again, and then what was never admitted.
        state = TrainingState(1, buffer.admission.next_group, FixedKL(0.1), buffer.unfinished)
        assert state.admission(2, staleness=1).admit() == [2, 4, 5, 6]

    run(scenario())


def test_dropping_everything_ends_the_run(experience):
    async def scenario() -> None:
        buffer = ExperienceBuffer(Admission(2), samples_per_prompt=1)
        while True:
            for index in await buffer.admit():
                buffer.expect(f"p{index}", index)
                await buffer.drop(f"p{index}")

    with pytest.raises(TooManyDrops, match="see the drop events"):
        run(scenario())


def test_generation_waits_for_a_weight_sync():
    async def scenario() -> None:
        buffer = ExperienceBuffer(Admission(2), samples_per_prompt=1)
        assert list(await buffer.admit()) == [0, 1]
        waiting = asyncio.create_task(buffer.admit())
        await asyncio.sleep(0.01)
        assert not waiting.done()
        buffer.admission.accept()
        buffer.admission.accept()
        await buffer.advance_version(1)
        assert list(await waiting) == [2, 3]

    run(scenario())
