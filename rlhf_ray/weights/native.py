"""Weights from GPU to GPU by vLLM's own transfer engines: `nccl` between GPUs, `ipc` on a shared GPU.

The learner's ranks are the sending side: when the driver tells them to, they start, fill and finish the update on the workers.
All workers receive in one collective, so they succeed or fail together; if the set of workers changes, all connect again.

Invariant: ranks in the NCCL group are distinct: the learner's rank 0 is 0, GPU j of worker i is 1 + i · tensor_parallel + j.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
import torch
from ray.actor import ActorHandle

from rlhf_ray.config.rollout import RolloutConfig
from rlhf_ray.types import PolicyVersion
from rlhf_ray.weights.channel import WeightSender


class NativeTransferUnavailable(ValueError):
    """`nccl` or `ipc` is configured for workers without a GPU."""


@dataclass(frozen=True)
class TransferPlan:
    """What every rank of the learner needs to connect to the workers."""

    kind: Literal["nccl", "ipc"]
    workers: tuple[ActorHandle, ...]
    tensor_parallel: int
    master_address: str
    master_port: int
    bucket_bytes: int

    @property
    def world_size(self) -> int:
        """Size of the NCCL group: the sender and every GPU of every worker."""
        return 1 + len(self.workers) * self.tensor_parallel

    def trainer_init_info(self, rank: int) -> Any:
        """vLLM's description of the sending side on one rank of the learner."""
        if self.kind == "nccl":
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

            return NCCLTrainerInitInfo(
                self.master_address,
                self.master_port,
                self.world_size,
                packed=True,
                packed_buffer_size_bytes=self.bucket_bytes,
                rank=rank,
            )
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        return IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=self.bucket_bytes, rank=rank)

    def worker_init_info(self, worker: int, shared: Mapping[str, Any]) -> dict[str, Any]:
        """What vLLM's sender tells all workers, with the first rank of worker number `worker`."""
        if "rank_offset" not in shared:
            return dict(shared)
        return {**shared, "rank_offset": shared["rank_offset"] + worker * self.tensor_parallel}


@dataclass
class WorkerClient:
    """vLLM's `VLLMWeightSyncClient` for this project's workers: every call goes to all workers and waits for them."""

    plan: TransferPlan
    version: PolicyVersion = field(default=0)
    """Version of the policy that the current update brings."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connect to all workers."""
        infos = [self.plan.worker_init_info(index, init_info) for index in range(len(self.plan.workers))]
        ray.get([w.init_native_transfer.remote(info) for w, info in zip(self.plan.workers, infos, strict=True)])

    def start_weight_update(self) -> None:
        """Begin an update on all workers."""
        ray.get([worker.start_native_update.remote() for worker in self.plan.workers])

    def update_weights(self, update_info: Any) -> None:
        """Let all workers receive the weights that `update_info` describes."""
        ray.get([worker.update_native.remote(update_info) for worker in self.plan.workers])

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Put the weights to use as policy `version`."""
        ray.get([worker.finish_weight_update.remote(self.version) for worker in self.plan.workers])


class NativeSender:
    """The sending side on one rank of the learner: created by `connect_weight_transfer`, used by `send_weights`."""

    def __init__(
        self,
        plan: TransferPlan,
        rank: int,
        metadata: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
        tensors: Callable[[], Iterable[tuple[str, torch.Tensor]]],
    ) -> None:
        """Connect to the workers; all ranks call this at the same time.

        Args:
            plan: the workers to connect to.
            rank: rank of this process in the learner; rank 0 sends, the others take part in gathering the weights.
            metadata: name, dtype and full shape of every parameter, in the order of `tensors`.
            tensors: starts a new pass over the full parameters, on the GPU.
        """
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        self._client = WorkerClient(plan)
        source = _weight_source(metadata, tensors)
        self._engine = WeightTransferTrainerFactory.trainer_init(
            plan.trainer_init_info(rank), client=self._client, source=source
        )

    def send(self, version: PolicyVersion) -> None:
        """Send all weights as policy `version`; all ranks call this at the same time."""
        self._client.version = version
        self._engine.send_weights()


class NativeChannel:
    """Tells the learner when to send, and connects it to the workers when their set has changed."""

    def __init__(self, config: RolloutConfig, kind: Literal["nccl", "ipc"]) -> None:
        """
        Raises:
            NativeTransferUnavailable: the workers have no GPU.
        """
        if config.workers.gpus == 0:
            raise NativeTransferUnavailable(
                f"rollout.weights.kind is {kind!r} and rollout.workers.gpus is 0; it transfers weights between GPUs only. "
                "Use kind: object_store, or give the rollout workers (and the learner) GPUs"
            )
        self._config, self._kind = config, kind
        self._connected: tuple[str, ...] = ()

    async def send(
        self, learner: WeightSender, workers: Mapping[str, ActorHandle], version: PolicyVersion
    ) -> dict[str, Exception]:
        """See `WeightChannel.send`. All workers fail together; after an error the next call connects again."""
        async with asyncio.timeout(self._config.weights.timeout_s):
            if self._connected != tuple(workers):
                await self._connect(learner, workers)
            connected, self._connected = self._connected, ()
            await asyncio.gather(*(rank.send_weights.remote(version) for rank in learner.ranks))
            self._connected = connected
        return {}

    async def _connect(self, learner: WeightSender, workers: Mapping[str, ActorHandle]) -> None:
        address, port = await learner.ranks[0].rendezvous.remote()
        plan = TransferPlan(
            self._kind,
            tuple(workers.values()),
            self._config.tensor_parallel,
            address,
            port,
            int(self._config.weights.bucket_mb * (1 << 20)),
        )
        await asyncio.gather(*(rank.connect_weight_transfer.remote(plan) for rank in learner.ranks))
        self._connected = tuple(workers)


def _weight_source(
    metadata: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
    tensors: Callable[[], Iterable[tuple[str, torch.Tensor]]],
) -> Any:
    """The learner's parameters as vLLM's `WeightSource`."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class LearnerWeights(WeightSource):
        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(name, dtype, shape) for name, dtype, shape in metadata]

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            return iter(tensors())

    return LearnerWeights()
