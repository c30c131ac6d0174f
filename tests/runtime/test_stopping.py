"""Stopping a run early, and running coroutines."""

from __future__ import annotations

import asyncio
import os
import signal
import threading

import pytest

from rlhf_ray.runtime.stopping import RunStopped, StopRequest, run_coroutine, stop_on_sigterm


async def answer(seconds: float = 0.0) -> int:
    await asyncio.sleep(seconds)
    return 7


def test_without_a_request_work_has_its_result():
    assert asyncio.run(StopRequest().or_result(answer())) == 7


def test_an_error_of_the_work_is_raised_unchanged():
    async def fail() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        asyncio.run(StopRequest().or_result(fail()))


def test_a_request_from_another_thread_ends_the_waiting_and_cancels_the_work():
    stop, cancelled = StopRequest(), []

    async def wait_for_ever() -> None:
        threading.Thread(target=stop.make).start()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    with pytest.raises(RunStopped):
        asyncio.run(stop.or_result(wait_for_ever()))
    assert cancelled == [True]


def test_nothing_begins_after_the_request():
    stop, began = StopRequest(), []

    async def work() -> None:
        began.append(True)

    stop.make()
    with pytest.raises(RunStopped):
        asyncio.run(stop.or_result(work()))
    with pytest.raises(RunStopped):
        stop.check()
    assert not began


def test_sigterm_makes_the_request_and_the_old_handler_is_restored():
    before = signal.getsignal(signal.SIGTERM)

    async def wait(stop: StopRequest) -> None:
        asyncio.get_running_loop().call_later(0.05, os.kill, os.getpid(), signal.SIGTERM)
        await stop.or_result(answer(60))

    with stop_on_sigterm() as stop, pytest.raises(RunStopped):
        asyncio.run(wait(stop))
    assert signal.getsignal(signal.SIGTERM) is before


async def in_an_event_loop(work):
    """A plain call while an event loop runs, as in a notebook."""
    return run_coroutine(work)


@pytest.mark.parametrize("call", [run_coroutine, lambda work: asyncio.run(in_an_event_loop(work))])
def test_a_coroutine_runs_to_its_end_with_and_without_a_running_loop(call):
    async def fail() -> None:
        raise KeyError("mine")

    assert call(answer(0.01)) == 7
    with pytest.raises(KeyError, match="mine"):
        call(fail())


@pytest.fixture
def ctrl_c_interrupts():
    """Python's own handler of SIGINT, also where the tests run in the background and a shell has them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_sigterm_and_ctrl_c_reach_a_coroutine_when_another_loop_runs(ctrl_c_interrupts):
    ended = []

    async def wait(stop: StopRequest, number: signal.Signals) -> None:
        asyncio.get_running_loop().call_later(0.05, os.kill, os.getpid(), number)
        try:
            await stop.or_result(answer(60))
        finally:
            ended.append(number)

    with stop_on_sigterm() as stop, pytest.raises(RunStopped):
        asyncio.run(in_an_event_loop(wait(stop, signal.SIGTERM)))
    # `asyncio.run` replaces the handler of Ctrl-C in the main thread; a notebook's loop does not.
    loop = asyncio.new_event_loop()
    try:
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(in_an_event_loop(wait(StopRequest(), signal.SIGINT)))
    finally:
        loop.close()
    assert ended == [signal.SIGTERM, signal.SIGINT]
