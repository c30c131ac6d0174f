"""Requests in, rollouts out, whichever worker answers.

Invariants: every request of a call is answered exactly once or the call raises; a request that a worker took to its grave is
sent to another with the same seed, so the answer is the one it would have had; a worker is never sent more than it can hold,
so those that are fast get more.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Sequence

from ray.exceptions import ObjectLostError, RayActorError

from rlhf_ray.config.rollout import SamplingConfig
from rlhf_ray.rollout.errors import EngineFailed, NoWorkerLeft
from rlhf_ray.rollout.members import Member
from rlhf_ray.rollout.membership import State
from rlhf_ray.rollout.samples import Sample, SampleRequest
from rlhf_ray.rollout.sharing import share
from rlhf_ray.types import Rollout, RolloutRequest

_LOST = (RayActorError, ObjectLostError, EngineFailed)
"""Failures of the worker, not of what it was asked: retried elsewhere."""


class Call:
    """One `generate`: its requests and the queue of what came back."""

    def __init__(self, requests: Sequence[RolloutRequest], sampling: SamplingConfig) -> None:
        self.sampling = sampling
        self.unanswered = {request.id: request for request in requests}
        self.arrived: asyncio.Queue[Rollout | Exception] = asyncio.Queue()
        if len(self.unanswered) < len(requests):
            raise ValueError("two requests of one call have the same id; ids are <prompt id>/<sample index>, unique in a call")

    def answer(self, sample: Sample) -> None:
        """Hand over a response, unless its request is answered already."""
        request = self.unanswered.pop(sample.id, None)
        if request is not None:
            self.arrived.put_nowait(
                Rollout(request, sample.token_ids, sample.logprobs, sample.versions, sample.finish_reason)
            )

    def fail(self, error: Exception) -> None:
        """End the call with an error."""
        self.unanswered.clear()
        self.arrived.put_nowait(error)


Ticket = tuple[Call, str]
"""A call and the id of one of its requests."""


class Dispatcher:
    """Shares requests among the members that are READY."""

    def __init__(self, members: Sequence[Member], capacity: int, lost: Callable[[Member, Exception], None]) -> None:
        """
        Args:
            members: the pool's, changed in place by whoever owns their states.
            capacity: requests that one worker is sent at a time.
            lost: told of a worker that failed, before its requests are sent to others.
        """
        self.paused = False
        """Requests wait, for a publication."""
        self._members = members
        self._capacity = capacity
        self._lost = lost
        self._waiting: deque[Ticket] = deque()
        self._serving: set[asyncio.Task] = set()
        self.redispatched: Callable[[Member, tuple[str, ...]], None] = lambda member, requests: None

    @property
    def in_flight(self) -> int:
        """Requests that some worker holds."""
        return sum(member.load for member in self._members if member.state is State.READY)

    async def run(self, call: Call) -> AsyncIterator[Rollout]:
        """Yield a call's rollouts as they finish; leaving early withdraws the rest."""
        expected = len(call.unanswered)
        self._waiting.extend((call, id) for id in call.unanswered)
        self.dispatch()
        try:
            for _ in range(expected):
                arrived = await call.arrived.get()
                if isinstance(arrived, Exception):
                    raise arrived
                yield arrived
        finally:
            call.unanswered.clear()
            self._waiting = deque(ticket for ticket in self._waiting if ticket[0] is not call)

    def dispatch(self) -> None:
        """Send what waits to who is ready; fail it where nobody ever will be."""
        if self.paused or not self._waiting:
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
                self._serving.add(task)
                task.add_done_callback(self._serving.discard)

    async def _serve(self, member: Member, call: Call, requests: Sequence[SampleRequest]) -> None:
        """One stream from one worker, to its end."""
        outstanding = {request.id for request in requests}
        try:
            stream = member.actor.generate.options(num_returns="streaming").remote(list(requests), call.sampling)
            async for batch in stream:
                for sample in await batch:
                    outstanding.discard(sample.id)
                    member.load -= 1
                    call.answer(sample)
                self.dispatch()
        except _LOST as error:
            self._lost(member, error)
            self._requeue(member, call, outstanding)
        except Exception as error:
            call.fail(error)
        finally:
            member.load -= len(outstanding)
            self.dispatch()

    def _requeue(self, member: Member, call: Call, outstanding: set[str]) -> None:
        again = tuple(id for id in call.unanswered if id in outstanding)
        self._waiting.extendleft((call, id) for id in reversed(again))
        if again:
            self.redispatched(member, again)

    def _give_up(self) -> None:
        error = NoWorkerLeft(
            f"{len(self._waiting)} requests wait and no rollout worker can take them: "
            + "; ".join(str(member) for member in self._members)
        )
        for call in {call for call, _ in self._waiting}:
            call.fail(error)
        self._waiting.clear()
