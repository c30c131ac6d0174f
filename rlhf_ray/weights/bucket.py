"""`WeightBucket`: named tensors packed into a flat byte buffer, and unpacked without a copy.

Invariants: a bucket holds whole tensors and is not larger than `bucket_bytes`, unless a single tensor is; packing uses the
memory of one bucket, never that of a model. The bytes of a tensor are kept as they are, so every dtype works, including
bfloat16. Ray gives a process on the same node a view of the buffer in shared memory.
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
"""Bytes: the size of a cache line, which is a multiple of every dtype's size."""

# Views of Ray's shared memory are read-only, and weights are only copied out of them.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


@dataclass(frozen=True)
class WeightBucket:
    """Some tensors of a model, one after another; each starts at a multiple of 64 bytes."""

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    """Names of `torch` dtypes: `float32`, `bfloat16`, …"""
    shapes: tuple[tuple[int, ...], ...]
    data: np.ndarray
    """uint8 [bytes]."""

    @property
    def offsets(self) -> Iterator[tuple[int, int]]:
        """The first byte and the number of bytes of each tensor."""
        start = 0
        for dtype, shape in zip(self.dtypes, self.shapes, strict=True):
            size = math.prod(shape) * getattr(torch, dtype).itemsize
            yield start, size
            start += _aligned(size)


def pack(named_tensors: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int) -> Iterator[WeightBucket]:
    """Pack tensors of any device in their order; each is copied before the next is requested.

    Args:
        named_tensors: Hugging Face names and full tensors.
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
    """The names and tensors of a bucket. The tensors are read-only views of its bytes, valid as long as the bucket."""
    for name, dtype, shape, (start, size) in zip(
        bucket.names, bucket.dtypes, bucket.shapes, bucket.offsets, strict=True
    ):
        yield name, torch.from_numpy(bucket.data[start : start + size]).view(getattr(torch, dtype)).reshape(shape)


def read_folder(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of a Hugging Face folder, in the order of its files.

    Raises:
        FileNotFoundError: the folder has no safetensors file.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{str(folder)!r} has no *.safetensors; expected a Hugging Face model folder")
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                yield name, tensors.get_tensor(name)


class _Packer:
    """A bucket that is being filled."""

    def __init__(self, size: int) -> None:
        self.buffer = np.empty(size, dtype=np.uint8)
        self.used = 0
        self.names: list[str] = []
        self.dtypes: list[str] = []
        self.shapes: list[tuple[int, ...]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        target = torch.from_numpy(self.buffer[self.used : self.used + tensor.nbytes]).view(tensor.dtype)
        target.copy_(tensor.detach().reshape(-1))
        self.names.append(name)
        self.dtypes.append(str(tensor.dtype).removeprefix("torch."))
        self.shapes.append(tuple(tensor.shape))
        self.used += _aligned(tensor.nbytes)

    def bucket(self) -> WeightBucket:
        return WeightBucket(tuple(self.names), tuple(self.dtypes), tuple(self.shapes), self.buffer[: self.used])


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
