"""vLLM's own GPU transfer, as far as it can be tested on a CPU: what each side is told."""

from __future__ import annotations

import pytest
import torch

from rlhf_ray.config.rollout import RolloutConfig, WeightChannelConfig
from rlhf_ray.weights.native import NativeTransferUnavailable, TransferPlan, _weight_source
from rlhf_ray.weights.sync import make_channel

_PLAN = dict(
    workers=(None, None, None), tensor_parallel=2, master_address="10.0.0.1", master_port=4000, bucket_bytes=99
)


@pytest.mark.parametrize("kind", ["nccl", "ipc"])
def test_native_transfer_without_gpus_is_refused_before_anything_starts(kind: str) -> None:
    with pytest.raises(NativeTransferUnavailable, match=f"{kind!r} and rollout.workers.gpus is 0.*object_store"):
        make_channel(RolloutConfig(weights=WeightChannelConfig(kind=kind)))


def test_ranks_of_the_nccl_group_are_distinct_and_complete() -> None:
    plan = TransferPlan("nccl", **_PLAN)
    sender = plan.trainer_init_info(rank=0)
    assert sender.is_sender and not plan.trainer_init_info(rank=1).is_sender
    offsets = [plan.worker_init_info(index, {"rank_offset": 1, "packed": True})["rank_offset"] for index in range(3)]
    gpus = [offset + gpu for offset in offsets for gpu in range(plan.tensor_parallel)]
    assert [0, *gpus] == list(range(sender.world_size))
    assert (sender.master_address, sender.master_port, sender.packed_buffer_size_bytes) == ("10.0.0.1", 4000, 99)


def test_ipc_tells_every_worker_the_same() -> None:
    plan = TransferPlan("ipc", **_PLAN)
    assert plan.trainer_init_info(rank=0).packed
    assert plan.worker_init_info(2, {"packed": True}) == {"packed": True}


def test_the_weight_source_declares_what_it_yields_and_yields_anew_each_round() -> None:
    weights = {"a": torch.zeros(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    metadata = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()]
    source = _weight_source(metadata, weights.items)
    declared = [(meta.name, meta.dtype, meta.shape) for meta in source.metadata()]
    for _ in range(2):
        assert [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in source] == declared
