"""What annotators' noise allows: the accuracy that no predictor of their choices can pass.

Invariant: computed from the known choice probabilities and never from the labels, so it does not vary with the draw of
the labels.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_ray.data.records import Pair
from rlhf_ray.data.simulator.annotators import PANEL, Annotator, population_preference


def pair_accuracy_ceiling(pairs: Sequence[Pair], panel: Sequence[Annotator] = PANEL) -> float:
    """Best expected accuracy on `pairs` of a predictor that does not know who labelled: the mean of max(p, 1 - p).

    p is the probability that a member of the panel chooses as the label says. Raises ValueError where there is no pair,
    and KeyError where a pair's metadata is not the simulator's.
    """
    if not pairs:
        raise ValueError("the ceiling of no pairs is undefined: give at least one pair")
    chances = [
        population_preference(pair.metadata, pair.chosen[-1]["content"], pair.rejected[-1]["content"], panel)
        for pair in pairs
    ]
    return sum(max(chance, 1 - chance) for chance in chances) / len(chances)
