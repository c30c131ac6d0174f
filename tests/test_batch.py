"""Ragged batches: splitting and padding never change a sequence, compared with loops over lists."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.batch import TARGET_COLUMNS, Batch, pack_sequences, pad, to_rows


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """1–6 sequences, some without a target; every entry of a column is different, so that a mix-up shows."""
    masks = draw(st.lists(st.lists(st.booleans(), min_size=0, max_size=7), min_size=1, max_size=6))
    masks = [np.asarray([False, *mask]) for mask in masks]
    tokens = np.split(np.arange(1, 1 + sum(map(len, masks))), np.cumsum([len(mask) for mask in masks])[:-1])
    batch = pack_sequences(tokens, masks)
    count = int(batch.target_mask.sum())
    return batch.with_columns(
        weights=np.arange(count, dtype=np.float32), advantages=-np.arange(count, dtype=np.float32)
    )


def as_lists(batch: Batch) -> list[tuple]:
    """Each sequence with its entries of every column, found by walking along."""
    result, token, target = [], 0, 0
    for length in batch.lengths.tolist():
        mask = batch.target_mask[token : token + length].tolist()
        present = [getattr(batch, name) for name in TARGET_COLUMNS if getattr(batch, name) is not None]
        entries = [column[target : target + sum(mask)].tolist() for column in present]
        result.append((batch.token_ids[token : token + length].tolist(), mask, entries))
        token, target = token + length, target + sum(mask)
    assert token == len(batch.token_ids)
    return result


@given(batches(), st.data())
def test_select_takes_whole_sequences_with_their_columns(batch, data):
    indices = data.draw(st.lists(st.integers(0, len(batch) - 1), max_size=8))
    whole = as_lists(batch)
    assert as_lists(batch.select(np.asarray(indices, dtype=np.int64))) == [whole[index] for index in indices]


@given(batches(), st.randoms(use_true_random=False))
def test_scatter_is_the_inverse_of_select(batch, random):
    order = list(range(len(batch)))
    random.shuffle(order)
    selected = batch.select(order)
    assert batch.scatter(np.asarray(order), selected.weights).tolist() == batch.weights.tolist()
    assert as_lists(selected.select(np.argsort(order))) == as_lists(batch)


@given(batches(), st.data())
def test_elements_are_selected_whole_with_their_labels(batch, data):
    cuts = data.draw(st.lists(st.booleans(), min_size=len(batch) - 1, max_size=len(batch) - 1))
    starts = np.asarray([True, *cuts])
    labels = np.arange(2 * len(batch), dtype=np.float32).reshape(-1, 2)
    batch = replace(batch, element_starts=starts, labels=labels)
    elements = [part.tolist() for part in np.split(np.arange(len(batch)), np.flatnonzero(starts)[1:])]
    assert batch.element_sizes.tolist() == [len(element) for element in elements]
    chosen = data.draw(st.lists(st.integers(0, len(elements) - 1), max_size=5))
    sequences = [sequence for element in chosen for sequence in elements[element]]
    selected = batch.select_elements(chosen)
    assert as_lists(selected) == [as_lists(batch)[sequence] for sequence in sequences]
    assert selected.labels.tolist() == labels[sequences].tolist()
    assert selected.element_sizes.tolist() == [len(elements[element]) for element in chosen]


def test_a_sequence_is_an_element_by_itself_unless_told_otherwise():
    batch = pack_sequences([np.arange(2), np.arange(3)], [np.asarray([False, True]), np.asarray([False, True, True])])
    assert batch.element_sizes.tolist() == [1, 1]
    assert batch.select_elements([1]).lengths.tolist() == [3]


@given(batches())
def test_target_counts(batch):
    assert batch.target_counts.tolist() == [sum(mask) for _, mask, _ in as_lists(batch)]


@given(batches())
def test_padded_positions_are_where_the_targets_are_predicted(batch):
    padded = pad(batch)
    flat = padded.input_ids.reshape(-1).tolist()
    width = int(batch.lengths.max())
    expected = [
        (row * width + place - 1, ids[place])
        for row, (ids, mask, _) in enumerate(as_lists(batch))
        for place in range(len(ids))
        if mask[place]
    ]
    assert list(zip(padded.positions.tolist(), padded.targets.tolist(), strict=True)) == expected
    for row, (ids, _, _) in enumerate(as_lists(batch)):
        assert flat[row * width : (row + 1) * width] == ids + [0] * (width - len(ids))
        assert flat[padded.last[row]] == ids[-1] and padded.last[row] == row * width + len(ids) - 1


@given(batches())
def test_rows_hold_each_sequence_from_the_left(batch):
    rows, mask = to_rows(batch.weights, batch.target_counts)
    for index, (_, _, (weights, _)) in enumerate(as_lists(batch)):
        assert rows[index][mask[index]].tolist() == weights
        assert mask[index].tolist() == [True] * len(weights) + [False] * (mask.shape[1] - len(weights))
        assert not rows[index][~mask[index]].any()


def test_a_column_of_another_length_is_refused():
    batch = pack_sequences([np.asarray([5, 6, 7])], [np.asarray([False, True, True])])
    with pytest.raises(ValueError, match="column advantages has 3 entries; this batch has 2 target tokens"):
        batch.with_columns(advantages=np.zeros(3, dtype=np.float32))
    assert batch.advantages is None


def test_types_are_those_of_the_docstrings():
    batch = pack_sequences([np.asarray([5, 6]), np.asarray([7])], [np.asarray([False, True]), np.asarray([False])])
    assert (batch.token_ids.dtype, batch.lengths.dtype, batch.target_mask.dtype) == (np.int32, np.int64, np.bool_)
    assert str(pad(batch).input_ids.dtype) == "torch.int64"
