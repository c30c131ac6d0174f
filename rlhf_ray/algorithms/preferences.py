"""Learning a reward from preferences: choices between two responses, and rankings of several.

Rankings are packed end to end. An element is one annotator's ranking of the responses to a prompt: `sizes` [E] holds the number
of its responses, and `ranks` [M] the place of each response, where 1 is the best and equal places are ties. Invariants: each loss
depends on differences of rewards only; a ranking of two responses is a choice between them, so for elements of two every loss is
Bradley-Terry's; the loss of a tie is the mean over the orders that it allows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from math import comb

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

GROUP, ANNOTATOR, VALUES = 0, 1, 2
"""Columns of a label (`Batch.labels`): the numbers of group and annotator (0: none), and the first of the label's values."""
PREFERENCE, MARGIN = VALUES, VALUES + 1
"""Values of a pair."""
RANK = VALUES
"""Value of a response in a ranking."""


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    preference: Tensor | float = 1.0,
    margin: Tensor | float = 0.0,
    reliability: Tensor | None = None,
) -> Tensor:
    """`-q log P(chosen) - (1 - q) log P(rejected)`, per pair, with P(chosen) = sigmoid(chosen - rejected - margin).

    Args:
        chosen, rejected: rewards [P].
        preference: q, [P] or a number: probability that `chosen` is the better one; 1 is a clear choice, 1/2 a tie.
        margin: [P] or a number, in units of reward: how much better the annotators found one response
            (Llama 2, arXiv 2307.09288). The reward of the better response must be higher by the margin.
        reliability: η, [P], strictly between 0 and 1: the probability that the annotator's label is meant. Then
            P(chosen) = η sigmoid(Δ) + (1 - η) sigmoid(-Δ) (Crowd-BT: Chen et al., WSDM 2013). None: η = 1.

    Returns: [P], nats.
    """
    right, wrong = logsigmoid(chosen - rejected - margin), logsigmoid(rejected - chosen - margin)
    if reliability is not None:
        meant, slipped = torch.log(reliability), torch.log1p(-reliability)
        right, wrong = torch.logaddexp(meant + right, slipped + wrong), torch.logaddexp(meant + wrong, slipped + right)
    return -(preference * right + (1.0 - preference) * wrong)


def centring_penalty(first: Tensor, second: Tensor) -> Tensor:
    """`(first + second)^2`, per pair of rewards [P]: keeps rewards around zero (arXiv 2312.09244, coefficient 0.01)."""
    return (first + second).square()


def pair_accuracy(chosen: Tensor, rejected: Tensor) -> Tensor:
    """1 where the chosen response has the higher reward, 1/2 for equal rewards, 0 otherwise; [P], float32.

    Equal rewards count half, so that a constant reward has an accuracy of 50 % and not 0.
    """
    return 0.5 * (1.0 + torch.sign(chosen.detach() - rejected.detach()).float())


MOST_TIED = 12
"""Largest number of responses on one place of a Plackett-Luce ranking: n tied responses give 2^n terms."""


@dataclass(frozen=True)
class Comparisons:
    """All C pairs of responses within elements."""

    first: np.ndarray
    """int64 [C]: index of one response."""
    second: np.ndarray
    """int64 [C]: index of the other."""
    element: np.ndarray
    """int64 [C]: the element of both."""
    share: np.ndarray
    """float32 [C]: 1 / number of pairs of the element, so that every element counts the same, whatever its size."""


def all_pairs(sizes: np.ndarray) -> Comparisons:
    """Every pair of every element: what InstructGPT trains on (arXiv 2203.02155).

    Args:
        sizes: int64 [E], each at least 2.
    """
    starts = np.cumsum(sizes) - sizes
    parts = []
    for size in np.unique(sizes):
        elements = np.flatnonzero(sizes == size)
        first, second = np.triu_indices(int(size), 1)
        offsets = starts[elements][:, None]
        share = np.full(offsets.shape[0] * len(first), 1.0 / len(first), dtype=np.float32)
        parts.append(((offsets + first).ravel(), (offsets + second).ravel(), np.repeat(elements, len(first)), share))
    return Comparisons(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def preference_of_ranks(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """float32 [C]: 1 where the first has the better (lower) rank, 1/2 for a tie, 0 otherwise."""
    return (0.5 * (1.0 + np.sign(second - first))).astype(np.float32)


def plackett_luce_loss(rewards: Tensor, ranks: np.ndarray, sizes: np.ndarray) -> Tensor:
    """`-Σ_i [r_(i) - logsumexp_{j >= i} r_(j)]` (Luce 1959, Plackett 1975): the best of all, then the best of the rest, …

    The loss of a tie is the mean over the orders of the tied responses.

    Args:
        rewards: [M].
        ranks: int [M].
        sizes: int64 [E]; at most `MOST_TIED` responses of an element share a place.

    Returns: [E], nats.
    """
    stages = [_stages(tuple(part)) for part in np.split(ranks.astype(int), np.cumsum(sizes)[:-1])]
    width = int(sizes.max())
    members = np.concatenate([np.pad(m, ((0, 0), (0, width - m.shape[1]))) for m, _ in stages])
    element = np.repeat(np.arange(len(sizes)), [len(weights) for _, weights in stages])
    rows = torch.from_numpy((np.cumsum(sizes) - sizes)[element][:, None] + np.where(members, np.arange(width), 0))
    candidates = rewards[rows.to(rewards.device)]
    remaining = candidates.masked_fill(~torch.from_numpy(members).to(rewards.device), -torch.inf).logsumexp(dim=1)
    weights = torch.from_numpy(np.concatenate([w for _, w in stages])).to(rewards)
    return _by_element(weights * remaining, element, sizes) - _sum(rewards, sizes)


def choice_loss(rewards: Tensor, ranks: np.ndarray, sizes: np.ndarray) -> Tensor:
    """Cross-entropy of the choice of the best of N: `logsumexp_j r_j` minus the mean reward of those on place 1.

    The order of the others is ignored. Arguments and result as of `plackett_luce_loss`.
    """
    starts, element = np.cumsum(sizes) - sizes, np.repeat(np.arange(len(sizes)), sizes)
    best = ranks == np.minimum.reduceat(ranks, starts)[element]
    share = torch.from_numpy(best / np.bincount(element, best)[element]).to(rewards)
    rows = rewards.new_full((len(sizes), int(sizes.max())), -torch.inf)
    places = torch.from_numpy(np.arange(len(ranks)) - starts[element]).to(rewards.device)
    rows = rows.index_put((torch.from_numpy(element).to(rewards.device), places), rewards)
    return rows.logsumexp(dim=1) - _sum(share * rewards, sizes)


@lru_cache(maxsize=4096)
def _stages(ranks: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Candidates of each successive choice in a ranking: bool [S, K], and the weights of the choices [S].

    Over all orders of t tied responses, the last s of them are each of the C(t, s) subsets equally often.
    """
    members, weights = [], []
    for rank in sorted(set(ranks)):
        tied = [index for index, other in enumerate(ranks) if other == rank]
        if len(tied) > MOST_TIED:
            raise ValueError(f"{len(tied)} responses share place {rank} of a ranking; at most {MOST_TIED} may")
        later = [other > rank for other in ranks]
        for size in range(len(tied), 0, -1):
            for subset in combinations(tied, size):
                members.append([after or index in subset for index, after in enumerate(later)])
                weights.append(1.0 / comb(len(tied), size))
    return np.asarray(members, dtype=bool), np.asarray(weights)


def _sum(values: Tensor, sizes: np.ndarray) -> Tensor:
    return _by_element(values, np.repeat(np.arange(len(sizes)), sizes), sizes)


def _by_element(values: Tensor, element: np.ndarray, sizes: np.ndarray) -> Tensor:
    """Sums of `values` [n] over each element: [E]."""
    return values.new_zeros(len(sizes)).index_add(0, torch.from_numpy(element).to(values.device), values)
