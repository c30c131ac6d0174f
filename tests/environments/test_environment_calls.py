"""Faults of environments: each is an error of its own episode and does not stop the others."""

from __future__ import annotations

import asyncio
import threading
import time

import numpy as np
import pytest

from rlhf_ray.environments.base import EnvironmentFailed, Step, checked_step, messages_of
from rlhf_ray.environments.calls import EnvironmentCalls, check_environment, in_thread, resolve_class
from rlhf_ray.types import Prompt, RolloutRequest

REQUEST = RolloutRequest(Prompt("0/p", np.zeros(1, dtype=np.int32), ()), 3, 11)


def play(config, response: str = "a") -> Step:
    async def once() -> Step:
        calls = EnvironmentCalls(config)
        environment, _ = await calls.reset(REQUEST)
        return await calls.step(environment, response, REQUEST.id)

    return asyncio.run(once())


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("raise", "step failed: LookupError: no such order"),
        ("text", "expected a rlhf_ray.environments.Step"),
        ("nan", "expected a finite number"),
        ("silent", "no observation although the episode is not done"),
        ("assistant", "not of the assistant"),
    ],
)
def test_every_error_names_the_environment_and_the_rollout(environment, fault, reason):
    with pytest.raises(EnvironmentFailed, match=reason) as caught:
        play(environment("Faulty", arguments={"greeting": fault}))
    assert "rollout 0/p/3" in str(caught.value) and caught.value.prompt_id == "0/p"


def test_an_environment_that_is_too_slow_is_abandoned_and_the_loop_goes_on(environment):
    began = time.monotonic()
    with pytest.raises(EnvironmentFailed, match=r"no answer within 0.2 s \(environment.timeout_s\)"):
        play(environment("Faulty", arguments={"greeting": "slow"}, timeout_s=0.2))
    assert time.monotonic() - began < 2
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "environment")


def test_the_opening_messages_and_the_seed_arrive(environment):
    async def reset():
        return await EnvironmentCalls(environment(arguments={"greeting": "Hi."})).reset(REQUEST)

    made, opening = asyncio.run(reset())
    assert opening == ({"role": "user", "content": "Hi."},) and made.seed == 11


def test_concurrency_is_limited(environment):
    running = most = 0
    lock = threading.Lock()

    def work(response: str) -> Step:
        nonlocal running, most
        with lock:
            running, most = running + 1, max(most, running + 1)
        time.sleep(0.02)
        with lock:
            running -= 1
        return Step(done=True)

    class Busy:
        step = staticmethod(work)

    async def many() -> None:
        calls = EnvironmentCalls(environment(concurrency=3))
        await asyncio.gather(*(calls.step(Busy(), "a", "p/0") for _ in range(12)))

    asyncio.run(many())
    assert most == 3


def test_a_result_that_is_not_awaited_any_more_is_ignored():
    async def leave() -> None:
        future = in_thread(time.sleep, 0.05)
        future.cancel()
        await asyncio.sleep(0.1)

    asyncio.run(leave())
    release, over = threading.Event(), threading.Event()

    async def end() -> None:
        in_thread(lambda: (release.wait(5), over.set()))

    asyncio.run(end())
    release.set()
    assert over.wait(5)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("no.such.module:X", "cannot import"),
        ("math:X", "has no 'X'"),
        ("environments_for_tests:NoStep", "no method step"),
    ],
)
def test_a_class_that_is_not_an_environment_is_refused(environment, path, reason):
    environment()
    with pytest.raises(ValueError, match=reason):
        resolve_class(path)


def test_arguments_that_do_not_fit_are_refused_before_a_run(environment):
    check_environment(environment(arguments={"greeting": "Hi."}))
    with pytest.raises(ValueError, match="does not accept these arguments.*'volume'"):
        check_environment(environment(arguments={"volume": 3}))


def test_text_is_a_turn_of_the_user():
    assert messages_of("x") == ({"role": "user", "content": "x"},)
    assert messages_of([{"role": "tool", "content": "x"}]) == ({"role": "tool", "content": "x"},)
    assert checked_step(Step("x", 1)) == Step(({"role": "user", "content": "x"},), 1.0)
    assert checked_step(Step(done=True)).observation == ()
    with pytest.raises(ValueError, match="got 3"):
        messages_of(3)
