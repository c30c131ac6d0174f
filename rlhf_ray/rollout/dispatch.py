"""Requests in, rollouts out, whichever worker answers.

Invariants: every request of a call is answered exactly once or the call raises; a request that a worker took to its
grave is sent to another with the same seed, so the answer is the one it would have had; a worker is never sent more
than it can hold, so those that are fast get more.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Callable, Sequence

import ray
from ray.exceptions import ObjectLostError, RayActorError

from rlhf_ray.config.rollout import SamplingConfig
from rlhf_ray.rollout.requests import EngineFailed, NoWorkerLeft, Sample, SampleRequest
from rlhf_ray.rollout.workers import Member, State
from rlhf_ray.types import Rollout, RolloutRequest


def share(waiting: int, loads: Sequence[int], capacity: int) -> list[int]:
    """How many of `waiting` requests each worker gets, so that the highest load is as low as it can be.

    Args:
        waiting: requests without a worker.
        loads: unfinished requests of each worker.
        capacity: most unfinished requests of one worker.

    Returns:
        One number per worker; their sum is below `waiting` where the workers are full.
    """
    given = [0] * len(loads)
    order = sorted(range(len(loads)), key=lambda worker: loads[worker])
    remaining = min(waiting, sum(max(capacity - load, 0) for load in loads))
    # Fill the lowest up to the level of the next: the first k workers end level, the others get nothing.
    for k in range(len(order), 0, -1):
        lowest = order[:k]
        total = remaining + sum(loads[worker] for worker in lowest)
        level, extra = divmod(total, k)
        if loads[lowest[-1]] <= level:
            for position, worker in enumerate(lowest):
                given[worker] = level + (position < extra) - loads[worker]
            break
    return given


WORKER_LOST = (RayActorError, ObjectLostError, EngineFailed)
"""Failures of a worker, not of what it was asked: retried elsewhere."""

Lost = Callable[[Member, Exception, tuple[str, ...]], None]
"""Told of a worker that failed, why, and which requests are sent to others for it."""


class Call:
    """One `generate`: its requests and the queue of what came back."""

    def __init__(self, requests: Sequence[RolloutRequest], sampling: SamplingConfig) -> None:
        self.sampling = sampling
        self.unanswered = {request.id: request for request in requests}
        self.arrived: asyncio.Queue[Rollout | Exception] = asyncio.Queue()
        self.streams: set[asyncio.Task[None]] = set()
        if len(self.unanswered) < len(requests):
            raise ValueError("two requests of one call have the same id (<prompt id>/<sample index>); ids must differ")

    def answer(self, sample: Sample) -> None:
        """Hand over a response, unless its request is answered already."""
        request = self.unanswered.pop(sample.id, None)
        if request is not None:
            self.arrived.put_nowait(
                Rollout(request, sample.token_ids, sample.logprobs, sample.versions, sample.finish_reason)
            )

    def fail(self, error: Exception) -> None:
        """End the call with an error."""
        self.arrived.put_nowait(error)


class Dispatcher:
    """Shares requests among the members that are READY."""

    def __init__(self, members: Sequence[Member], capacity: int, lost: Lost) -> None:
        """
        Args:
            members: the pool's; it owns their states and changes them in `lost`.
            capacity: requests that one worker is sent at a time.
            lost: see `Lost`; must make the member DEAD.
        """
        self._members = members
        self._capacity = capacity
        self._lost = lost
        self._waiting: deque[tuple[Call, str]] = deque()
        self._paused = False

    @property
    def in_flight(self) -> int:
        """Requests that some worker holds."""
        return sum(member.load for member in self._members if member.state is not State.DEAD)

    def pause(self) -> None:
        """Let requests wait until `resume`."""
        self._paused = True

    def resume(self) -> None:
        """Send what has been waiting."""
        self._paused = False
        self._dispatch()

    async def run(self, call: Call) -> AsyncGenerator[Rollout]:
        """Yield a call's rollouts as they finish; leaving early withdraws the rest."""
        expected = len(call.unanswered)
        self._waiting.extend((call, id) for id in call.unanswered)
        self._dispatch()
        try:
            for _ in range(expected):
                arrived = await call.arrived.get()
                if isinstance(arrived, Exception):
                    raise arrived
                yield arrived
        finally:
            self._waiting = deque((other, id) for other, id in self._waiting if other is not call)
            # What comes to an end by itself has nothing left to say; the rest is told to stop.
            for stream in call.streams if call.unanswered else ():
                stream.cancel()
            await asyncio.gather(*call.streams, return_exceptions=True)

    def _dispatch(self) -> None:
        """Send what waits to who is ready; fail it where nobody will be."""
        if self._paused or not self._waiting:
            return
        ready = [member for member in self._members if member.state is State.READY]
        if not ready:
            self._give_up()
            return
        shares = share(len(self._waiting), [member.load for member in ready], self._capacity)
        for member, count in zip(ready, shares, strict=True):
            batches: dict[Call, list[SampleRequest]] = defaultdict(list)
            for _ in range(count):
                call, id = self._waiting.popleft()
                batches[call].append(SampleRequest.of(call.unanswered[id]))
            for call, requests in batches.items():
                member.load += len(requests)
                task = asyncio.create_task(self._serve(member, call, requests))
                call.streams.add(task)
                task.add_done_callback(call.streams.discard)

    async def _serve(self, member: Member, call: Call, requests: list[SampleRequest]) -> None:
        """One stream of answers from one worker, to its end."""
        outstanding = {request.id for request in requests}
        stream = member.actor.generate.options(num_returns="streaming").remote(requests, call.sampling)
        try:
            async for batch in stream:
                for sample in await batch:
                    outstanding.discard(sample.id)
                    member.load -= 1
                    call.answer(sample)
                self._dispatch()
        except WORKER_LOST as error:
            again = tuple(id for id in call.unanswered if id in outstanding)
            self._waiting.extendleft((call, id) for id in reversed(again))
            self._lost(member, error, again)
        except asyncio.CancelledError:
            await _stop(stream)
        except Exception as error:
            call.fail(error)
        finally:
            member.load -= len(outstanding)
            self._dispatch()

    def _give_up(self) -> None:
        error = NoWorkerLeft(
            f"{len(self._waiting)} requests wait and no rollout worker can take them: "
            + "; ".join(str(member) for member in self._members)
        )
        for call in {call for call, _ in self._waiting}:
            call.fail(error)
        self._waiting.clear()


async def _stop(stream: ray.ObjectRefGenerator) -> None:
    """Cancel a stream and wait until its worker has let go of the requests."""
    ray.cancel(stream)
    await asyncio.gather(stream.completed(), return_exceptions=True)  # it ends by being cancelled
