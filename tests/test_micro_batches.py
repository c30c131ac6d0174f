"""Micro-batch plans: each sequence exactly once, within the budget, balanced; for any lengths and elements."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.micro_batches import OVERHEAD, plan_micro_batches

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=60)
RANKS = st.integers(1, 5)
BUDGET = st.integers(1, 1000)


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, int, int, np.ndarray]:
    """Lengths, ranks, budget, and the number of sequences of each element."""
    lengths = np.asarray(draw(LENGTHS))
    cuts = draw(st.lists(st.integers(1, max(1, len(lengths) - 1)), max_size=30)) if len(lengths) > 1 else []
    elements = np.diff(sorted({0, *cuts, len(lengths)}))
    return lengths, draw(RANKS), draw(BUDGET), elements


@given(problems())
def test_every_sequence_once_and_elements_together(problem):
    lengths, ranks, budget, elements = problem
    plan = plan_micro_batches(lengths, ranks, budget, elements)
    everything = np.concatenate([micro for rank in plan for micro in rank])
    assert sorted(everything.tolist()) == list(range(len(lengths)))
    number = np.repeat(np.arange(len(elements)), elements)
    for rank in plan:
        for micro in rank:
            for element in np.unique(number[micro]):
                places = np.flatnonzero(number[micro] == element)
                assert (np.diff(places) == 1).all(), "consecutive"
                assert micro[places].tolist() == np.flatnonzero(number == element).tolist(), "whole and in order"


@given(problems())
def test_each_sequence_is_an_element_by_default(problem):
    lengths, ranks, budget, _ = problem
    plans = [plan_micro_batches(lengths, ranks, budget, each) for each in (None, np.ones(len(lengths), dtype=np.int64))]
    first, second = ([micro.tolist() for rank in plan for micro in rank] for plan in plans)
    assert first == second


@given(problems())
def test_all_ranks_have_the_same_number_of_micro_batches(problem):
    lengths, ranks, budget, elements = problem
    plan = plan_micro_batches(lengths, ranks, budget, elements)
    assert len(plan) == ranks and len({len(rank) for rank in plan}) == 1
    fullest = max(sum(len(micro) > 0 for micro in rank) for rank in plan)
    assert len(plan[0]) == fullest, "a step in which no rank has anything to do"


@given(problems())
def test_padded_tokens_stay_within_the_budget_unless_one_element_exceeds_it(problem):
    lengths, ranks, budget, elements = problem
    number = np.repeat(np.arange(len(elements)), elements)
    for rank in plan_micro_batches(lengths, ranks, budget, elements):
        for micro in rank:
            padded = len(micro) * int(lengths[micro].max()) if len(micro) else 0
            assert padded <= budget or len(set(number[micro])) == 1


@given(problems())
def test_packed_micro_batches_are_full(problem):
    """All sequences are planned, elements stay together, budgets hold, and no two micro-batches of a rank would fit into one."""
    lengths, ranks, budget, elements = problem
    plan = plan_micro_batches(lengths, ranks, budget, elements, packing=True)
    everything = np.concatenate([micro for rank in plan for micro in rank])
    assert sorted(everything.tolist()) == list(range(len(lengths)))
    assert len({len(rank) for rank in plan}) == 1
    number = np.repeat(np.arange(len(elements)), elements)
    for rank in plan:
        tokens = sorted(int(lengths[micro].sum()) for micro in rank if len(micro))
        assert len(tokens) < 2 or tokens[0] + tokens[1] > budget
        for micro in rank:
            assert lengths[micro].sum() <= budget or len(set(number[micro])) == 1
            for element in np.unique(number[micro]):
                places = np.flatnonzero(number[micro] == element)
                assert (np.diff(places) == 1).all()
                assert micro[places].tolist() == np.flatnonzero(number == element).tolist()


@given(st.lists(st.integers(1, 300), min_size=1, max_size=9), BUDGET)
def test_no_other_cut_of_the_sorted_sequences_costs_less(lengths, budget):
    """The cost of padding and of micro-batches is the lowest of all ways to cut."""
    (plan,) = plan_micro_batches(np.asarray(lengths), 1, budget)
    ordered = sorted(lengths, reverse=True)

    def cost(cuts: list[list[int]]) -> float:
        return sum(len(cut) * max(cut) for cut in cuts) + len(cuts) * budget * OVERHEAD

    def every_way(rest: list[int]) -> Iterator[list[list[int]]]:
        if not rest:
            yield []
        for count in range(1, len(rest) + 1):
            if count == 1 or count * rest[0] <= budget:
                yield from ([rest[:count], *others] for others in every_way(rest[count:]))

    best = min(cost(way) for way in every_way(ordered))
    assert cost([[lengths[i] for i in micro] for micro in plan]) == pytest.approx(best)


@given(problems())
def test_no_rank_has_more_than_the_mean_and_one_element(problem):
    lengths, ranks, budget, elements = problem
    totals = np.asarray([part.sum() for part in np.split(lengths, np.cumsum(elements)[:-1])])
    loads = [
        sum(int(lengths[micro].sum()) for micro in rank)
        for rank in plan_micro_batches(lengths, ranks, budget, elements)
    ]
    assert max(loads) <= lengths.sum() / ranks + totals.max()
    assert max(loads) - min(loads) <= totals.max(), (
        "the last element given to the fullest rank went to the emptiest then"
    )


@given(problems())
def test_a_plan_is_a_function_of_its_arguments(problem):
    first, second = (plan_micro_batches(*problem[:3], problem[3]) for _ in range(2))
    assert [[micro.tolist() for micro in rank] for rank in first] == [
        [micro.tolist() for micro in rank] for rank in second
    ]


def test_an_example_by_hand():
    plan = plan_micro_batches(np.asarray([19, 50, 20, 40, 30]), ranks=2, token_budget=60)
    # Longest first to the emptier rank: 50 | 40, then 30 to the second, 20 to the first, and 19 to either (70 and 70).
    # One token of padding costs less than another micro-batch (60/32).
    assert [[micro.tolist() for micro in rank] for rank in plan] == [[[1], [2, 0]], [[3], [4]]]
