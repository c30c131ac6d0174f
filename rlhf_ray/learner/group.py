"""`LearnerGroup`: the ranks of one learner as one object for the driver.

Invariants: results are in the order of the given batch for any plan; every call is made on all ranks, because sharding makes
the calls collective; `steps` counts the optimizer steps that were applied.
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
from rlhf_ray.micro_batches import plan_micro_batches
from rlhf_ray.runs.storage.location import is_uri, portable
from rlhf_ray.runs.storage.rank_files import fetch_uploaded_files, record_remote_files, working_root_id


class LearnerGroup:
    """One or more `Learner` ranks that train one model."""

    def __init__(self, ranks: Sequence[ActorHandle], spec: LearnerSpec) -> None:
        self.ranks = tuple(ranks)
        self.spec = spec
        self.steps = 0

    @classmethod
    async def start(cls, spec: LearnerSpec, options: Callable[[int], dict[str, Any]]) -> LearnerGroup:
        """Start the ranks, connect them, load and shard the model."""
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
        """Evaluate the targets of a batch, in the batch's order: float32 [M].

        The result holds log-probabilities (policy), values (value model) or scores (discriminator, whose sequences have one
        target, the last token).

        Args:
            base: evaluate the model without its adapters, as it was before training.
        """
        plan = self._plan(batch)
        results = await self._on_shards(batch, plan, lambda rank, *shard: rank.evaluate.remote(*shard, base))
        order = np.concatenate([np.concatenate(micro) for micro in plan])
        return batch.scatter(order, np.concatenate(results))

    async def update(self, batch: Batch, learning_rate: float, beta: float = 0.0) -> StepResult:
        """Take one optimizer step over the whole batch.

        Raises:
            NonFiniteLoss: the step was refused, and the weights are unchanged.
        """
        plan = self._plan(batch)
        results = await self._on_shards(
            batch, plan, lambda rank, *shard: rank.update.remote(*shard, learning_rate, beta)
        )
        self.steps += 1
        return results[0]

    async def probe_logprobs(self, token_ids: np.ndarray) -> np.ndarray:
        """Log-probabilities of tokens 1… of one sequence, float32 [T−1], to compare with a rollout engine's."""
        results = await asyncio.gather(*(rank.probe_logprobs.remote(token_ids) for rank in self.ranks))
        return results[0]

    async def save_checkpoint(self, folder: Path) -> None:
        """Let every rank write its share below `folder`; shares on other nodes go to the store."""
        reference = portable(folder)
        await asyncio.gather(*(rank.save_checkpoint.remote(reference, self.steps) for rank in self.ranks))
        if is_uri(reference):
            shares = await asyncio.gather(
                *(rank.upload_rank_files.remote(reference) for rank in await self._elsewhere())
            )
            if shares:
                record_remote_files(folder, functools.reduce(operator.or_, shares))

    async def load_checkpoint(self, folder: Path) -> None:
        """Let every rank read its share; all of them must succeed."""
        steps = await asyncio.gather(*(rank.load_checkpoint.remote(portable(folder)) for rank in self.ranks))
        self.steps = steps[0]

    async def save_pretrained(self, folder: Path) -> None:
        """Write the model as a Hugging Face folder (from rank 0; all ranks gather)."""
        reference = portable(folder)
        await asyncio.gather(*(rank.save_pretrained.remote(reference) for rank in self.ranks))
        if is_uri(reference) and self.ranks[0] in await self._elsewhere():
            await asyncio.to_thread(
                fetch_uploaded_files, folder, await self.ranks[0].upload_rank_files.remote(reference)
            )

    async def _elsewhere(self) -> list[ActorHandle]:
        """One rank for each node other than the driver's."""
        places = await asyncio.gather(*(rank.working_root_id.remote() for rank in self.ranks))
        first = {place: rank for place, rank in reversed(list(zip(places, self.ranks, strict=True)))}
        first.pop(working_root_id(), None)
        return list(first.values())

    def close(self) -> None:
        """Kill the ranks."""
        for rank in self.ranks:
            ray.kill(rank)

    def _plan(self, batch: Batch) -> tuple[tuple[np.ndarray, ...], ...]:
        config = self.spec.config
        return plan_micro_batches(batch.lengths, len(self.ranks), config.micro_batch_tokens, packing=config.packing)

    async def _on_shards(
        self, batch: Batch, plan: Sequence[Sequence[np.ndarray]], call: Callable[..., ObjectRef]
    ) -> list[Any]:
        """Make `call(rank, shard, micro-batches of the shard)` for every rank; returns the results by rank."""
        calls = (
            call(rank, batch.select(np.concatenate(micro)), _local(micro))
            for rank, micro in zip(self.ranks, plan, strict=True)
        )
        return await asyncio.gather(*calls)


def _local(micro_batches: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Indices into a rank's own sequences, which are sent in the order of its micro-batches."""
    ends = np.cumsum([len(m) for m in micro_batches])
    return [np.arange(end - len(m), end) for m, end in zip(micro_batches, ends, strict=True)]


def _with_env(options: dict[str, Any], spec: LearnerSpec) -> dict[str, Any]:
    """Add the variable from which DeepSpeed chooses its accelerator when it is imported."""
    if spec.config.workers.gpus > 0:
        return options
    env_vars = {"DS_ACCELERATOR": "cpu", **options["runtime_env"]["env_vars"]}
    return {**options, "runtime_env": {**options["runtime_env"], "env_vars": env_vars}}
