"""Stops a run early on SIGTERM, which comes from `rlhf-ray stop` or from a node that is about to be shut down.

`run_coroutine` runs the coroutines that can be stopped.

Invariant: waiting is given up at once and computation is finished; everything learned is in a checkpoint before `RunStopped` is
raised.
"""

from __future__ import annotations

import asyncio
import contextvars
import signal
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

EXIT_STATUS = 128 + signal.SIGTERM
"""Exit status of a process whose run was stopped. It is not 0, because the run is not complete."""


class RunStopped(Exception):
    """The run was stopped on request and can be resumed. The message names the last step."""


class StopRequest:
    """A request to stop the run. A signal handler makes it; coroutines wait for it, and other code polls `made`."""

    def __init__(self) -> None:
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
        self.made = False

    def make(self) -> None:
        """Make the request. Repeated calls change nothing."""
        self.made = True
        for loop, event in self._waiting:
            loop.call_soon_threadsafe(event.set)

    def check(self) -> None:
        """Raise RunStopped if the request was made."""
        if self.made:
            raise RunStopped("the run was asked to stop")

    async def or_result(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for `work` and return its result.

        Raises:
            RunStopped: as soon as the request is made; `work` is cancelled, or not started at all.
        """
        if self.made:
            work.close()
        self.check()
        entry = (asyncio.get_running_loop(), asyncio.Event())
        self._waiting.append(entry)
        working, requested = asyncio.ensure_future(work), asyncio.ensure_future(entry[1].wait())
        try:
            await asyncio.wait({working, requested}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                self.check()
            return await working
        finally:
            self._waiting.remove(entry)
            for task in (working, requested):
                task.cancel()
            await asyncio.gather(working, requested, return_exceptions=True)


@contextmanager
def stop_on_sigterm() -> Iterator[StopRequest]:
    """A request that SIGTERM makes. Enter it after `ray.init`, which installs a handler of its own.

    Only the main thread can handle signals; elsewhere the request is never made.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = signal.signal(signal.SIGTERM, lambda *_: request.make())
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before)


def run_coroutine(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, like `asyncio.run`, also where an event loop runs already (in a notebook).

    There it runs in the event loop of another thread, while this thread waits and still handles signals. KeyboardInterrupt
    cancels the coroutine.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    result: Future[T] = Future()
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[T]]] = Future()

    async def supervise() -> T:
        task = asyncio.ensure_future(work)
        started.set_result((asyncio.get_running_loop(), task))
        return await task

    def target() -> None:
        try:
            result.set_result(asyncio.run(supervise()))
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(target,), name="run_coroutine")
    thread.start()
    try:
        return result.result()
    except BaseException:
        if not result.done():  # this thread was interrupted
            loop, task = started.result()
            loop.call_soon_threadsafe(task.cancel)
        raise
    finally:
        thread.join()
