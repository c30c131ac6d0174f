"""`Dispatcher`: shares requests among the workers and collects their rollouts.

Invariants: every request of a call is answered exactly once, or the call raises; the requests of a worker that dies are sent to
others with the same seeds, so the answers are the same; a worker is never sent more requests than its capacity, so faster
workers get more of them.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Callable, Sequence

import ray
from ray.exceptions import ObjectLostError, RayActorError

from rlhf_ray.config.rollout import SamplingConfig
from rlhf_ray.rollout.requests import EngineFailed, EngineOutput, EngineRequest, NoWorkerLeft
from rlhf_ray.rollout.workers import State, WorkerHandle
from rlhf_ray.types import Rollout, RolloutRequest

WORKER_LOST = (RayActorError, ObjectLostError, EngineFailed)
"""Failures of a worker and not of its requests: these are sent to another worker."""

OnLost = Callable[[WorkerHandle, Exception, tuple[str, ...]], None]
"""Called with a worker that failed, its error, and the ids of the requests that are sent to others."""


class Call:
    """One `generate`: its requests that are not answered yet, and the queue of results."""

    def __init__(self, requests: Sequence[RolloutRequest], sampling: SamplingConfig) -> None:
        self.sampling = sampling
        self.unanswered = {request.id: request for request in requests}
        self.results: asyncio.Queue[Rollout | Exception] = asyncio.Queue()
        self.streams: set[asyncio.Task[None]] = set()
        if len(self.unanswered) < len(requests):
            raise ValueError("two requests of one call have the same id (<prompt id>/<sample index>); ids must differ")

    def answer(self, output: EngineOutput) -> None:
        """Add a rollout to the results, unless its request is answered already."""
        request = self.unanswered.pop(output.id, None)
        if request is not None:
            self.results.put_nowait(
                Rollout(request, output.token_ids, output.logprobs, output.versions, output.finish_reason)
            )

    def fail(self, error: Exception) -> None:
        """End the call with an error."""
        self.results.put_nowait(error)


class Dispatcher:
    """Shares requests among the READY workers."""

    def __init__(self, workers: Sequence[WorkerHandle], capacity: int, on_lost: OnLost) -> None:
        """
        Args:
            workers: the pool's list, which grows as workers start.
            capacity: maximum number of unanswered requests of one worker.
            on_lost: see `OnLost`; must make the worker DEAD.
        """
        self._workers = workers
        self._capacity = capacity
        self._on_lost = on_lost
        self._waiting: deque[tuple[Call, str]] = deque()
        self._paused = False

    @property
    def in_flight(self) -> int:
        """Number of requests that workers hold."""
        return sum(worker.load for worker in self._workers if worker.state is not State.DEAD)

    def pause(self) -> None:
        """Let requests wait until `resume`."""
        self._paused = True

    def resume(self) -> None:
        """Send the waiting requests."""
        self._paused = False
        self._dispatch()

    async def run(self, call: Call) -> AsyncGenerator[Rollout]:
        """Yield a call's rollouts as they finish; leaving early cancels the rest."""
        expected = len(call.unanswered)
        self._waiting.extend((call, id) for id in call.unanswered)
        self._dispatch()
        try:
            for _ in range(expected):
                result = await call.results.get()
                if isinstance(result, Exception):
                    raise result
                yield result
        finally:
            self._waiting = deque((other, id) for other, id in self._waiting if other is not call)
            # If all requests are answered, the streams end by themselves; otherwise they are cancelled.
            for stream in call.streams if call.unanswered else ():
                stream.cancel()
            await asyncio.gather(*call.streams, return_exceptions=True)

    def _dispatch(self) -> None:
        """Send waiting requests to READY workers; fail them if there are none."""
        if self._paused or not self._waiting:
            return
        ready = [worker for worker in self._workers if worker.state is State.READY]
        if not ready:
            self._fail_waiting()
            return
        shares = share(len(self._waiting), [worker.load for worker in ready], self._capacity)
        for worker, count in zip(ready, shares, strict=True):
            batches: dict[Call, list[EngineRequest]] = defaultdict(list)
            for _ in range(count):
                call, id = self._waiting.popleft()
                batches[call].append(EngineRequest.of(call.unanswered[id]))
            for call, requests in batches.items():
                worker.load += len(requests)
                task = asyncio.create_task(self._stream(worker, call, requests))
                call.streams.add(task)
                task.add_done_callback(call.streams.discard)

    async def _stream(self, worker: WorkerHandle, call: Call, requests: list[EngineRequest]) -> None:
        """Send requests to one worker and receive its outputs until all have come."""
        outstanding = {request.id for request in requests}
        stream = worker.actor.generate.options(num_returns="streaming").remote(requests, call.sampling)
        try:
            async for batch in stream:
                for output in await batch:
                    outstanding.discard(output.id)
                    worker.load -= 1
                    call.answer(output)
                self._dispatch()
        except WORKER_LOST as error:
            again = tuple(id for id in call.unanswered if id in outstanding)
            self._waiting.extendleft((call, id) for id in reversed(again))
            self._on_lost(worker, error, again)
        except asyncio.CancelledError:
            await _stop(stream)
        except Exception as error:
            call.fail(error)
        finally:
            worker.load -= len(outstanding)
            self._dispatch()

    def _fail_waiting(self) -> None:
        error = NoWorkerLeft(
            f"{len(self._waiting)} requests wait and no rollout worker can take them: "
            + "; ".join(str(worker) for worker in self._workers)
        )
        for call in {call for call, _ in self._waiting}:
            call.fail(error)
        self._waiting.clear()


async def _stop(stream: ray.ObjectRefGenerator) -> None:
    """Cancel a stream and wait until its worker has dropped the requests."""
    ray.cancel(stream)
    await asyncio.gather(stream.completed(), return_exceptions=True)  # a cancelled stream ends with an error


def share(waiting: int, loads: Sequence[int], capacity: int) -> list[int]:
    """How many of the waiting requests each worker gets, so that the highest load is as low as possible.

    Args:
        waiting: number of requests without a worker.
        loads: number of unanswered requests of each worker.
        capacity: maximum load of one worker.

    Returns:
        One number per worker; their sum is less than `waiting` if the workers are full.
    """
    shares = [0] * len(loads)
    order = sorted(range(len(loads)), key=lambda worker: loads[worker])
    remaining = min(waiting, sum(max(capacity - load, 0) for load in loads))
    # Raise the least loaded workers to the load of the next one: the first k workers end level, the others get nothing.
    for k in range(len(order), 0, -1):
        lowest = order[:k]
        total = remaining + sum(loads[worker] for worker in lowest)
        level, extra = divmod(total, k)
        if loads[lowest[-1]] <= level:
            for position, worker in enumerate(lowest):
                shares[worker] = level + (position < extra) - loads[worker]
            break
    return shares
