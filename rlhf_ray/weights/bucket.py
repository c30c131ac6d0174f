"""Named tensors packed into flat byte buffers, and back without a copy.

Invariants: a bucket holds whole tensors; it is at most `bucket_bytes` large unless a single tensor is larger; memory in
use is one bucket, never a model. The bytes are the tensor's own, so every dtype survives, bfloat16 too. Ray hands the
buffer of a bucket to a process on the same node as a view of shared memory.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

_ALIGNMENT = 64
"""Bytes: a cache line, and a multiple of every dtype's size."""

# Views of Ray's shared memory are read-only. Weights are only ever copied out of them.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


@dataclass(frozen=True)
class WeightBucket:
    """Some tensors of a model, one after another, each at a multiple of 64 bytes."""

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    """As in `torch`: `float32`, `bfloat16`, …"""
    shapes: tuple[tuple[int, ...], ...]
    data: np.ndarray
    """uint8, one dimension."""

    @property
    def offsets(self) -> Iterator[tuple[int, int]]:
        """First byte and length in bytes of each tensor."""
        start = 0
        for dtype, shape in zip(self.dtypes, self.shapes, strict=True):
            size = math.prod(shape) * getattr(torch, dtype).itemsize
            yield start, size
            start += _aligned(size)


def pack(named_tensors: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int) -> Iterator[WeightBucket]:
    """Pack tensors in their order, on any device; each is read once, before the next is asked for.

    Args:
        named_tensors: Hugging Face names with full tensors.
        bucket_bytes: size of a bucket; a larger tensor gets a bucket of its own.
    """
    packer: _Packer | None = None
    for name, tensor in named_tensors:
        size = _aligned(tensor.nbytes)
        if packer is not None and packer.used + size > len(packer.buffer):
            yield packer.bucket()
            packer = None
        if packer is None:
            packer = _Packer(max(bucket_bytes, size))
        packer.add(name, tensor)
    if packer is not None:
        yield packer.bucket()


def unpack(bucket: WeightBucket) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a bucket as views of its bytes: valid as long as the bucket is, and not to be written to."""
    for name, dtype, shape, (start, size) in zip(
        bucket.names, bucket.dtypes, bucket.shapes, bucket.offsets, strict=True
    ):
        yield name, torch.from_numpy(bucket.data[start : start + size]).view(getattr(torch, dtype)).reshape(shape)


class _Packer:
    """A bucket being filled."""

    def __init__(self, size: int) -> None:
        self.buffer = np.empty(size, dtype=np.uint8)
        self.used = 0
        self.names: list[str] = []
        self.dtypes: list[str] = []
        self.shapes: list[tuple[int, ...]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        place = torch.from_numpy(self.buffer[self.used : self.used + tensor.nbytes]).view(tensor.dtype)
        place.copy_(tensor.detach().reshape(-1))
        self.names.append(name)
        self.dtypes.append(str(tensor.dtype).removeprefix("torch."))
        self.shapes.append(tuple(tensor.shape))
        self.used += _aligned(tensor.nbytes)

    def bucket(self) -> WeightBucket:
        return WeightBucket(tuple(self.names), tuple(self.dtypes), tuple(self.shapes), self.buffer[: self.used])


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def read_folder(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Names with tensors, in the order of the files.

    Raises:
        FileNotFoundError: there is no safetensors file.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{str(folder)!r} has no *.safetensors; expected a Hugging Face model folder")
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                yield name, tensors.get_tensor(name)
