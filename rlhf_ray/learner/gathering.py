"""Reading the tensors of a sharded model, a bucket at a time. Collective: all ranks go through them in the same order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from rlhf_ray.models.lora import Weight


def gathered(weights: Sequence[Weight], bucket_bytes: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and whole tensor of each; valid until the next is asked for.

    Args:
        bucket_bytes: of parameters that are whole at a time, where ZeRO 3 shards them; more for a single larger tensor.
    """
    import deepspeed

    for chunk in _chunks(weights, bucket_bytes):
        sharded = [p for weight in chunk for p in weight.parameters if hasattr(p, "ds_id")]
        with deepspeed.zero.GatheredParameters(sharded, modifier_rank=None):
            for weight in chunk:
                yield weight.name, weight.value()


def _chunks(weights: Sequence[Weight], bucket_bytes: int) -> Iterator[list[Weight]]:
    chunk: list[Weight] = []
    size = 0
    for weight in weights:
        size_of = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in weight.parameters)
        if chunk and size + size_of > bucket_bytes:
            yield chunk
            chunk, size = [], 0
        chunk.append(weight)
        size += size_of
    if chunk:
        yield chunk
