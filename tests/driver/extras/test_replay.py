"""The batches of the discriminator: all new samples once per pass, some old ones, both sides with a weight of one half."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.batch import Batch
from rlhf_ray.driver.extras.discriminator import Replay, discriminator_batches, labeled_batch, scored_at_end


def numbered(first: int, count: int) -> Batch:
    """Sequence i has 2 + i % 3 tokens, all of them `first + i`."""
    lengths = np.asarray([2 + i % 3 for i in range(count)], dtype=np.int64)
    return scored_at_end(np.repeat(np.arange(first, first + count, dtype=np.int32), lengths), lengths)


def identities(batch: Batch) -> list[int]:
    return batch.token_ids[np.cumsum(batch.lengths) - 1].tolist()


@given(st.integers(1, 12), st.lists(st.integers(1, 7), min_size=1, max_size=6))
def test_the_newest_are_kept(capacity, sizes):
    replay, first = Replay(capacity), 0
    for size in sizes:
        replay, first = replay.added(numbered(first, size)), first + size
    assert identities(replay.samples) == list(range(max(0, first - capacity), first))
    assert replay.samples.target_mask.sum() == len(replay) and (replay.samples.target_counts == 1).all()


def test_nothing_is_kept_where_there_is_no_room():
    assert len(Replay(0).added(numbered(0, 3))) == 0


@pytest.mark.parametrize("samples", [None, numbered(5, 7)])
def test_saved_and_loaded_is_the_same(tmp_path, samples):
    replay = Replay(7, samples)
    replay.save(tmp_path / "replay.safetensors")
    loaded = Replay(7, numbered(100, 3)).loaded(tmp_path / "replay.safetensors")
    assert len(loaded) == len(replay)
    if samples is not None:
        for name in ("token_ids", "lengths", "target_mask"):
            ours, theirs = getattr(loaded.samples, name), getattr(samples, name)
            assert (ours == theirs).all() and ours.dtype == theirs.dtype


@given(
    new=st.integers(4, 12),
    kept=st.integers(0, 9),
    replayed=st.integers(0, 6),
    count=st.integers(1, 4),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 3),
)
def test_the_batches_of_a_step(new, kept, replayed, count, epochs, seed):
    replay = Replay(9, numbered(100, kept) if kept else None)
    shown = [numbered(1000 + 100 * epoch, new + replayed) for epoch in range(epochs)]
    batches = discriminator_batches(numbered(0, new), replay, replayed, shown, count, (seed, 1))
    again = discriminator_batches(numbered(0, new), replay, replayed, shown, count, (seed, 1))
    assert [identities(batch) for batch in batches] == [identities(batch) for batch in again], "a function of the seed"
    assert len(batches) == epochs * count
    for epoch in range(epochs):
        part = batches[epoch * count : (epoch + 1) * count]
        seen = [
            (number, label)
            for batch in part
            for number, label in zip(identities(batch), batch.labels[:, 0], strict=True)
        ]
        negatives, positives = ([number for number, label in seen if label == side] for side in (0, 1))
        assert sorted(number for number in negatives if number < 100) == list(range(new))
        old = [number for number in negatives if number >= 100]
        assert len(old) == len(set(old)) == min(kept, replayed)
        assert sorted(positives) == identities(shown[epoch])
    for batch in batches:
        demonstrated = batch.labels[:, 0] > 0
        assert batch.weights[demonstrated].sum() == pytest.approx(0.5) == batch.weights[~demonstrated].sum()


def test_labels_and_weights_follow_a_selection():
    batch = labeled_batch(numbered(0, 2), numbered(10, 3)).select([4, 0])
    assert batch.labels[:, 0].tolist() == [0, 1] and batch.weights.tolist() == pytest.approx([1 / 6, 1 / 4])
