"""Assigns sequences to ranks and micro-batches. Pure; every plan gives the same loss, and only the speed differs.

Invariants: every sequence is in exactly one micro-batch; all ranks have the same number of micro-batches (some of them empty
where a rank has less work), because sharded parameters make every forward and backward pass a collective operation.
"""

from __future__ import annotations

import heapq

import numpy as np

from rlhf_ray.batch import segments

OVERHEAD = 1 / 32
"""Fixed cost of a micro-batch as a share of the token budget: 256 of 8192 tokens, between a CPU's (100) and a GPU's."""


def plan_micro_batches(
    lengths: np.ndarray, ranks: int, token_budget: int, elements: np.ndarray | None = None, packing: bool = False
) -> tuple[tuple[np.ndarray, ...], ...]:
    """Balance sequences over ranks by tokens, then cut each rank's sequences into micro-batches.

    Args:
        lengths: int64 [B], tokens of each sequence.
        ranks: number of data-parallel ranks.
        token_budget: most tokens of one micro-batch, padding included; a larger element has a micro-batch of its own.
        elements: int64 [E], number of consecutive sequences of each element (a pair, a ranking), which stay together;
            None: every sequence is an element.
        packing: sequences are packed without padding, so as few micro-batches as possible are planned. Otherwise sequences of
            similar length are padded together.

    Returns:
        `plan[rank][step]`: int64 indices of the sequences that a rank computes in a step, longest elements first.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    sizes = np.ones(len(lengths), dtype=np.int64) if elements is None else elements
    starts = np.cumsum(sizes) - sizes
    totals, longest = np.add.reduceat(lengths, starts), np.maximum.reduceat(lengths, starts)
    shards = _balance(totals, ranks)
    if packing:
        per_rank = [_fill(shard, totals, token_budget) for shard in shards]
    else:
        per_rank = [_cut(shard, longest, sizes, token_budget) for shard in shards]
    steps = max(len(cuts) for cuts in per_rank)
    empty = np.zeros(0, dtype=np.int64)
    return tuple(tuple(segments(sizes, c) for c in cuts) + (empty,) * (steps - len(cuts)) for cuts in per_rank)


def _balance(totals: np.ndarray, ranks: int) -> list[np.ndarray]:
    """Longest-processing-time rule: assign each element, longest first, to the rank with the fewest tokens so far."""
    if ranks == 1:
        return [np.argsort(-totals, kind="stable")]
    shards: list[list[int]] = [[] for _ in range(ranks)]
    heap = [(0, rank) for rank in range(ranks)]
    for index in np.argsort(-totals, kind="stable"):
        load, rank = heapq.heappop(heap)
        shards[rank].append(int(index))
        heapq.heappush(heap, (load + int(totals[index]), rank))
    return [np.asarray(shard, dtype=np.int64) for shard in shards]


def _fill(shard: np.ndarray, totals: np.ndarray, token_budget: int) -> list[np.ndarray]:
    """Best-fit decreasing: put each element, longest first, where it leaves the least room (at most 11/9 · optimum + 1 bins)."""
    bins: list[list[int]] = []
    room = np.zeros(0, dtype=np.int64)
    for element in shard[np.argsort(-totals[shard], kind="stable")]:
        left = room - totals[element]
        if (left >= 0).any():
            place = int(np.argmin(np.where(left >= 0, left, token_budget)))
        else:
            place = len(bins)
            bins.append([])
            room = np.append(room, token_budget)
        bins[place].append(int(element))
        room[place] -= totals[element]
    return [np.asarray(members, dtype=np.int64) for members in bins]


def _cut(shard: np.ndarray, longest: np.ndarray, sizes: np.ndarray, token_budget: int) -> list[np.ndarray]:
    """Cut the elements, longest first, into micro-batches of at most `token_budget` padded tokens, at the lowest total cost.

    Dynamic programming: the best cut of the first n elements is the best cut of the first m, then elements m to n−1 together.
    """
    shard = shard[np.argsort(-longest[shard], kind="stable")]
    widths = longest[shard]
    sequences = np.concatenate([[0], np.cumsum(sizes[shard])])
    costs = np.zeros(len(shard) + 1)
    starts = np.zeros(len(shard) + 1, dtype=np.int64)
    for end in range(1, len(shard) + 1):
        padded = widths[:end] * (sequences[end] - sequences[:end])
        fits = padded <= token_budget
        fits[-1] = True  # an element that exceeds the budget by itself
        total = np.where(fits, costs[:end] + padded, np.inf)
        starts[end] = np.argmin(total)
        costs[end] = total[starts[end]] + token_budget * OVERHEAD
    cuts, end = [], len(shard)
    while end > 0:
        cuts.append(shard[starts[end] : end])
        end = starts[end]
    return cuts[::-1]
