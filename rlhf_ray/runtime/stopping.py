"""A run that is asked to end early: by SIGTERM, from `rlhf-ray stop` or from a node that is about to go.

Invariant: whatever is waited for is given up at once, whatever is being computed is finished; what was learned is in a
checkpoint before `RunStopped` is raised.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

EXIT_STATUS = 128 + signal.SIGTERM
"""Of a process that ended because it was asked to: not 0, the run is not complete."""


class RunStopped(Exception):
    """The run ended early, as asked, and can be resumed; the message says where it stands."""


class StopRequest:
    """Whether the run was asked to end. Set from a signal handler; waited for by coroutines, polled by everybody else."""

    def __init__(self) -> None:
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
        self.made = False

    def make(self) -> None:
        """Ask. Later requests change nothing."""
        self.made = True
        for loop, event in self._waiting:
            loop.call_soon_threadsafe(event.set)

    def check(self) -> None:
        """Raises RunStopped where the request was made."""
        if self.made:
            raise RunStopped("stopped, as asked")

    async def or_result(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`.

        Raises:
            RunStopped: as soon as the request is made; `work` is cancelled, or was never begun.
        """
        if self.made:
            work.close()
        self.check()
        entry = (asyncio.get_running_loop(), asyncio.Event())
        self._waiting.append(entry)
        working, asked = asyncio.ensure_future(work), asyncio.ensure_future(entry[1].wait())
        try:
            await asyncio.wait({working, asked}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                self.check()
            return await working
        finally:
            self._waiting.remove(entry)
            for task in (working, asked):
                task.cancel()
            await asyncio.gather(working, asked, return_exceptions=True)


@contextmanager
def stop_on_sigterm() -> Iterator[StopRequest]:
    """A request that SIGTERM makes. Open it after `ray.init`, which sets a handler of its own; only a main thread has signals."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = signal.signal(signal.SIGTERM, lambda *_: request.make())
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before)
