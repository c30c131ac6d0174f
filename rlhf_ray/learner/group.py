"""`LearnerGroup`: the ranks of one learner as one object for the driver.

Invariants: a result comes back in the order of the batch it was asked for, whatever the plan; every call is made on all ranks,
because sharding makes them collective; a group's optimizer step number counts the steps that were applied.
"""

from __future__ import annotations

import asyncio
import functools
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import ObjectRef
from ray.actor import ActorHandle

from rlhf_ray.batch import Batch
from rlhf_ray.learner.actor import Learner, LearnerSpec
from rlhf_ray.learner.sharded_model import StepResult
from rlhf_ray.micro_batches import Plan, plan_micro_batches
from rlhf_ray.runs.storage.location import is_uri, portable
from rlhf_ray.runs.storage.rank_files import fetch_uploaded_files, record_remote_files, working_root_id


class LearnerGroup:
    """Any number of `Learner` ranks that train one model."""

    def __init__(self, ranks: Sequence[ActorHandle], spec: LearnerSpec) -> None:
        self.ranks = tuple(ranks)
        self.spec = spec
        self.steps = 0

    @classmethod
    async def start(cls, spec: LearnerSpec, options: Callable[[int], dict[str, Any]]) -> LearnerGroup:
        """Start the ranks, join them, load and shard the model."""
        count = spec.config.workers.count
        actor = ray.remote(Learner)
        ranks = [
            actor.options(**_with_env(options(index), spec), max_restarts=0).remote(spec, index, count)
            for index in range(count)
        ]
        host, port = await ranks[0].rendezvous.remote()
        await asyncio.gather(*(rank.start.remote(host, port) for rank in ranks))
        return cls(ranks, spec)

    async def evaluate(self, batch: Batch, base: bool = False) -> np.ndarray:
        """float32 [M] in the batch's order: log-probabilities (policy), values (value model) or scores (discriminator, whose
        sequences have one target, the last token) of its targets.

        `base`: of the model without its adapters, which it was before training.
        """
        results = await self._on_shards(batch, lambda rank, *shard: rank.evaluate.remote(*shard, base))
        order = np.concatenate([np.concatenate(micro) for micro in self._plan(batch).micro_batches])
        return batch.scatter(order, np.concatenate(results))

    async def update(self, batch: Batch, learning_rate: float, beta: float = 0.0) -> StepResult:
        """One optimizer step over the whole batch.

        Raises:
            NonFiniteLoss: the step was refused; the weights are those of before it.
        """
        results = await self._on_shards(batch, lambda rank, *shard: rank.update.remote(*shard, learning_rate, beta))
        self.steps += 1
        return results[0]

    async def probe_logprobs(self, token_ids: np.ndarray) -> np.ndarray:
        """float32 [T−1]: log-probabilities of tokens 1… of one sequence, for comparing engines."""
        results = await asyncio.gather(*(rank.probe_logprobs.remote(token_ids) for rank in self.ranks))
        return results[0]

    async def save_checkpoint(self, folder: Path) -> None:
        """Every rank writes its share below `folder`; what lies on other nodes then is in the store, and noted."""
        reference = portable(folder)
        await asyncio.gather(*(rank.save_checkpoint.remote(reference, self.steps) for rank in self.ranks))
        if is_uri(reference):
            shares = await asyncio.gather(*(rank.put_share.remote(reference) for rank in await self._elsewhere()))
            if shares:
                record_remote_files(folder, functools.reduce(operator.or_, shares))

    async def load_checkpoint(self, folder: Path) -> None:
        """Every rank reads its share; all must succeed."""
        steps = await asyncio.gather(*(rank.load_checkpoint.remote(portable(folder)) for rank in self.ranks))
        self.steps = steps[0]

    async def save_pretrained(self, folder: Path) -> None:
        """Write the model as a Hugging Face folder (from rank 0; all ranks gather)."""
        reference = portable(folder)
        await asyncio.gather(*(rank.save_pretrained.remote(reference) for rank in self.ranks))
        if is_uri(reference) and self.ranks[0] in await self._elsewhere():
            await asyncio.to_thread(fetch_uploaded_files, folder, await self.ranks[0].put_share.remote(reference))

    async def _elsewhere(self) -> list[ActorHandle]:
        """A rank for each node but the driver's."""
        places = await asyncio.gather(*(rank.whereabouts.remote() for rank in self.ranks))
        first = {place: rank for place, rank in reversed(list(zip(places, self.ranks, strict=True)))}
        first.pop(working_root_id(), None)
        return list(first.values())

    def close(self) -> None:
        for rank in self.ranks:
            ray.kill(rank)

    def _plan(self, batch: Batch) -> Plan:
        config = self.spec.config
        return plan_micro_batches(batch.lengths, len(self.ranks), config.micro_batch_tokens, packing=config.packing)

    async def _on_shards(self, batch: Batch, call: Callable[..., ObjectRef]) -> list[Any]:
        """`call(rank, shard, its micro-batches)` on every rank."""
        shards = self._plan(batch).micro_batches
        calls = (
            call(rank, batch.select(np.concatenate(micro)), _local(micro))
            for rank, micro in zip(self.ranks, shards, strict=True)
        )
        return await asyncio.gather(*calls)


def _local(micro_batches: Sequence[np.ndarray]) -> list[np.ndarray]:
    """A rank gets its sequences in the order of its micro-batches: their indices become consecutive."""
    ends = np.cumsum([len(m) for m in micro_batches])
    return [np.arange(end - len(m), end) for m, end in zip(micro_batches, ends, strict=True)]


def _with_env(options: dict[str, Any], spec: LearnerSpec) -> dict[str, Any]:
    """DeepSpeed chooses its accelerator when it is imported: say so in the process's environment."""
    if spec.config.workers.gpus > 0:
        return options
    env_vars = {"DS_ACCELERATOR": "cpu", **options["runtime_env"]["env_vars"]}
    return {**options, "runtime_env": {**options["runtime_env"], "env_vars": env_vars}}
