"""Where rollouts wait to be trained on: between the coroutine that streams them and the one that trains.

Invariants: bounded by admission; a batch is handed over in the order of admission, not of arrival, so that a run does not
depend on timing; every group that was admitted is trained, given up, or among the `unfinished`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from rlhf_ray.driver.admission import Admission, GroupAssembler
from rlhf_ray.types import Experience


class ExperienceBuffer:
    """Complete groups, by their index in the prompt source."""

    def __init__(
        self,
        admission: Admission,
        samples_per_prompt: int,
        has_signal: Callable[[Sequence[Experience]], bool] = lambda group: True,
    ) -> None:
        """`has_signal` says of a complete group whether there is anything to learn from it."""
        self.admission, self._has_signal = admission, has_signal
        self._assembler = GroupAssembler(samples_per_prompt)
        self._ready: dict[int, list[Experience]] = {}
        self._index: dict[str, int] = {}
        self._changed = asyncio.Condition()

    @property
    def unfinished(self) -> tuple[int, ...]:
        """Indices of the groups that were admitted, and neither handed over nor given up."""
        return tuple(sorted({*self._index.values(), *self._ready}))

    async def admit(self) -> list[int]:
        """Wait until groups may start; their indices."""
        async with self._changed:
            while not (admitted := self.admission.admit()):
                await self._changed.wait()
            return admitted

    def expect(self, prompt_id: str, index: int) -> None:
        """The group of `prompt_id` is admitted as number `index`."""
        self._index[prompt_id] = index

    async def put(self, experience: Experience) -> bool:
        """Add one sample. False: it completed a group without signal, which is given up; room is made for another."""
        request = experience.rollout.request
        group = self._assembler.add(request.prompt.id, request.sample_index, experience)
        if group is None:
            return True
        async with self._changed:
            index = self._index.pop(request.prompt.id)
            kept = self._has_signal(group) or not self.admission.resample(index)
            if kept:
                self._ready[index] = group
                self.admission.accept()
            self._changed.notify_all()
        return kept

    async def drop(self, prompt_id: str) -> bool:
        """Give up a group; whether it was still alive. Room is made for another."""
        alive = self._assembler.drop(prompt_id)
        if alive:
            async with self._changed:
                del self._index[prompt_id]
                self.admission.drop()
                self._changed.notify_all()
        return alive

    async def take(self, groups: int) -> list[Experience]:
        """Wait for that many groups; their experiences, oldest group first."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._ready) >= groups)
            chosen = sorted(self._ready)[:groups]
            return [experience for index in chosen for experience in self._ready.pop(index)]

    async def publish(self, version: int) -> None:
        """Tell admission that the workers have a new policy."""
        async with self._changed:
            self.admission.publish(version)
            self._changed.notify_all()
