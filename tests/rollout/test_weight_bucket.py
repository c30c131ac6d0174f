"""Packing weights: nothing is lost, nothing is copied twice, and buckets keep their size."""

from __future__ import annotations

import numpy as np
import pytest
import ray
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.weights.bucket import WeightBucket, pack, unpack

_SHAPES = st.lists(st.integers(0, 7), max_size=3).map(tuple)
_DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int8])


@settings(max_examples=60, deadline=None)
@given(tensors=st.lists(st.tuples(_SHAPES, _DTYPES), max_size=8), bucket_bytes=st.integers(1, 2000))
def test_what_is_packed_comes_back_in_order(tensors: list, bucket_bytes: int) -> None:
    sent = [(f"layer.{i}", (torch.randn(shape) * 9).to(dtype)) for i, (shape, dtype) in enumerate(tensors)]
    received = [pair for bucket in pack(sent, bucket_bytes) for pair in unpack(bucket)]
    assert [name for name, _ in received] == [name for name, _ in sent]
    for (_, there), (_, here) in zip(sent, received, strict=True):
        assert here.dtype == there.dtype and here.shape == there.shape
        assert torch.equal(here, there)


def test_a_bucket_is_full_and_no_larger_than_asked() -> None:
    buckets = list(pack([(str(i), torch.ones(100)) for i in range(10)], bucket_bytes=1000))
    assert [len(bucket.names) for bucket in buckets] == [2] * 5  # 400 bytes each, at multiples of 64
    assert all(bucket.data.nbytes <= 1000 for bucket in buckets)


def test_a_tensor_larger_than_a_bucket_travels_alone() -> None:
    tensors = [("small", torch.ones(4)), ("large", torch.ones(1000)), ("last", torch.ones(4))]
    assert [bucket.names for bucket in pack(tensors, bucket_bytes=256)] == [("small",), ("large",), ("last",)]


def test_packing_reads_one_tensor_at_a_time() -> None:
    """A gathered tensor may be freed when the next one is requested, so it must have been copied by then."""

    def gathered():
        for i in range(5):
            tensor = torch.full((50,), float(i))
            yield str(i), tensor
            tensor.fill_(-1.0)

    received = dict(pair for bucket in pack(gathered(), 10_000) for pair in unpack(bucket))
    assert [float(received[str(i)][0]) for i in range(5)] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_a_non_contiguous_tensor_keeps_its_values() -> None:
    matrix = torch.arange(12.0).reshape(3, 4)
    [(_, received)] = unpack(next(pack([("transposed", matrix.T)], 1000)))
    assert torch.equal(received, matrix.T)


def test_unpacking_copies_nothing() -> None:
    bucket = next(pack([("w", torch.zeros(8))], 1000))
    [(_, view)] = unpack(bucket)
    bucket.data.view(np.float32)[3] = 5.0
    assert view[3] == 5.0


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_ray_hands_a_bucket_over_as_a_view_of_shared_memory(ray_session: None) -> None:
    bucket = next(pack([("w", torch.arange(500_000, dtype=torch.float32))], 1 << 22))
    received: WeightBucket = ray.get(ray.put(bucket))
    assert not received.data.flags.owndata and not received.data.flags.writeable
    [(_, tensor)] = unpack(received)
    assert torch.equal(tensor, torch.arange(500_000, dtype=torch.float32))


def test_a_bucket_is_immutable() -> None:
    bucket = next(pack([("w", torch.zeros(1))], 10))
    with pytest.raises(AttributeError):
        bucket.names = ()
