"""Reliability of annotators: `P(y | k) = η_k σ(Δ) + (1 - η_k) σ(-Δ)`, fitted by online EM together with the reward.

η_k is the probability that a label of annotator k is meant. The E-step computes from the current reward how probable it is
that a label is meant; the M-step sets η_k to the mean of that over annotator k's labels. The two do not decrease the likelihood
(Dempster et al. 1977); one step per minibatch with fading memory is online EM (Cappé and Moulines 2009). By Fisher's identity
the gradient of the mixture's likelihood with η held fixed is that of EM's objective, so the reward model needs only its loss.

Invariants: objects are immutable; only sums over labels are used, so the split of a minibatch changes nothing; η stays strictly
between 0 and 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


def probability_meant(difference: Tensor, preference: Tensor, reliability: Tensor) -> Tensor:
    """E-step: P(the label is meant | label, rewards), [P].

    Args:
        difference: Δ = chosen - rejected, [P].
        preference: q [P]; for a label of `chosen`, σ(logit η + Δ).
        reliability: η of each pair's annotator, [P].
    """
    prior = torch.logit(reliability)
    return preference * torch.sigmoid(prior + difference) + (1.0 - preference) * torch.sigmoid(prior - difference)


@dataclass(frozen=True)
class MeantLabels:
    """The E-step's sums over labels for A annotators. They add up over micro-batches and ranks."""

    meant: Tensor
    """float64 [A]: expected number of labels that are meant."""
    labels: Tensor
    """float64 [A]: number of labels."""

    def __add__(self, other: MeantLabels) -> MeantLabels:
        return MeantLabels(self.meant + other.meant, self.labels + other.labels)

    def cpu(self) -> MeantLabels:
        """A copy in host memory."""
        return MeantLabels(self.meant.cpu(), self.labels.cpu())


def count_meant(meant: Tensor, annotator: Tensor, clarity: Tensor, annotators: int) -> MeantLabels:
    """Sums of the E-step [P] by annotator (int64 [P]).

    Args:
        clarity: [P], from 0 for a tie, which tells nothing about its annotator, to 1 for a clear choice.
        annotators: their number A.
    """
    zeros = torch.zeros(annotators, dtype=torch.float64, device=meant.device)
    weighted = (clarity * meant).detach().double()
    return MeantLabels(zeros.index_add(0, annotator, weighted), zeros.index_add(0, annotator, clarity.double()))


@dataclass(frozen=True)
class Reliabilities:
    """η of A annotators, from a fading sum over their labels and a Beta prior."""

    meant: np.ndarray
    """float64 [A]: expected number of labels that are meant."""
    labels: np.ndarray
    """float64 [A]: number of labels."""
    prior: float
    """η of an annotator without labels."""
    strength: float
    """Number of labels that the prior counts as."""
    memory: float
    """After this many further labels of an annotator an old label counts 1/e, because the reward has improved since."""

    @classmethod
    def start(cls, annotators: int, prior: float, strength: float, memory: float) -> Reliabilities:
        """The initial state, without labels."""
        return cls(np.zeros(annotators), np.zeros(annotators), prior, strength, memory)

    @property
    def values(self) -> np.ndarray:
        """η, float64 [A]."""
        return (self.meant + self.strength * self.prior) / (self.labels + self.strength)

    def after(self, seen: MeantLabels) -> Reliabilities:
        """The state after the M-step with the labels of one minibatch."""
        new = seen.labels.numpy()
        kept = np.exp(-new / self.memory)
        return replace(self, meant=kept * self.meant + seen.meant.numpy(), labels=kept * self.labels + new)
