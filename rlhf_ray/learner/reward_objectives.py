"""The losses of a reward model, for each kind of feedback. Pure, except for the model's forward pass and `observe`.

The labels of a sequence are (group, annotator, feedback). Group and annotator are numbers, 0 for none. The feedback of a pair is
(preference, margin), of a ranking (rank,), and of scores a rating for each aspect, NaN where none was given. The weight of an
element is at its first sequence.

Invariant: an element's loss depends on its own sequences only, and its weight is relative to the global minibatch, so the sum
over micro-batches and ranks is the loss for every way to cut the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from rlhf_ray.algorithms.diagnostics import Diagnostics
from rlhf_ray.algorithms.preferences import (
    ANNOTATOR,
    GROUP,
    MARGIN,
    PREFERENCE,
    RANK,
    VALUES,
    Comparisons,
    all_pairs,
    bradley_terry_loss,
    centring_penalty,
    choice_loss,
    pair_accuracy,
    plackett_luce_loss,
    preference_of_ranks,
)
from rlhf_ray.algorithms.reliability import MeantLabels, Reliabilities, count_meant, probability_meant
from rlhf_ray.algorithms.statistics import Summary, summarise
from rlhf_ray.algorithms.token_weights import weighted_sum
from rlhf_ray.batch import Batch, ModelInput
from rlhf_ray.config.supervised import RewardModelConfig
from rlhf_ray.models.reward_heads import RewardHeads


class RewardObjective:
    """Loss and diagnostics of a micro-batch, for the configured kind of feedback."""

    def __init__(self, config: RewardModelConfig, heads: RewardHeads, annotators: int = 0) -> None:
        """`annotators`: the highest annotator number; read only where reliability is learned."""
        self.config, self.heads = config, heads
        self.reliabilities: Reliabilities | None = None
        if (settings := config.reliability) is not None:
            self.reliabilities = Reliabilities.start(annotators, settings.prior, settings.strength, settings.memory)

    def __call__(self, model: nn.Module, inputs: ModelInput, batch: Batch) -> tuple[Tensor, Diagnostics]:
        assert batch.labels is not None and batch.weights is not None
        sizes = batch.element_sizes
        rewards, deltas = self._rewards(model(inputs), batch.labels)
        losses, diagnostics = self._losses(rewards, batch.labels, sizes)
        if self.config.groups is not None:
            losses = losses + self.config.groups.shrinkage * _element_means(deltas.square().sum(dim=1), sizes)
        weights = batch.weights[np.cumsum(sizes) - sizes]
        return weighted_sum(losses, torch.from_numpy(weights).to(losses)), diagnostics

    def _losses(self, rewards: Tensor, labels: np.ndarray, sizes: np.ndarray) -> tuple[Tensor, Diagnostics]:
        """Losses [E] of the elements, whose numbers of sequences are `sizes`."""
        if self.config.kind == "pairs":
            return self._pairs(rewards, labels)
        if self.config.kind == "rankings":
            return self._rankings(rewards, labels, sizes)
        return self._scores(rewards, labels)

    def observe(self, diagnostics: Diagnostics) -> None:
        """The M-step of reliability, from the diagnostics of a training step's global minibatch."""
        if self.reliabilities is not None and isinstance(diagnostics, ComparisonDiagnostics):
            self.reliabilities = self.reliabilities.after(diagnostics.meant)

    def _rewards(self, outputs: Tensor, labels: np.ndarray) -> tuple[Tensor, Tensor]:
        """r_0 + δ_g and δ_g for the group of each sequence, both [b, aspects]; δ is 0 for group 0."""
        outputs = outputs.reshape(len(outputs), -1, len(self.heads.weights))
        group = torch.from_numpy(labels[:, GROUP].astype(np.int64)).to(outputs.device)
        deltas = outputs[torch.arange(len(outputs), device=outputs.device), group]
        deltas = torch.where((group > 0)[:, None], deltas, torch.zeros_like(deltas))
        return outputs[:, 0] + deltas, deltas

    def _pairs(self, rewards: Tensor, labels: np.ndarray) -> tuple[Tensor, Diagnostics]:
        first, second = rewards[0::2, 0], rewards[1::2, 0]
        of_pairs = labels[0::2]
        preference, margin = (torch.from_numpy(of_pairs[:, column]).to(first) for column in (PREFERENCE, MARGIN))
        reliability, meant = self._reliability(first - second, preference, of_pairs[:, ANNOTATOR].astype(np.int64))
        losses = bradley_terry_loss(first, second, preference, self.config.margin * margin, reliability)
        losses = losses + self.config.centring * centring_penalty(first, second)
        return losses, _compare(losses, first - second, preference, meant)

    def _reliability(
        self, difference: Tensor, preference: Tensor, numbers: np.ndarray
    ) -> tuple[Tensor | None, MeantLabels]:
        """η of each pair's annotator (the prior for number 0), and the E-step for the annotators with a number."""
        if self.reliabilities is None:
            return None, _NO_LABELS
        known = np.concatenate([[self.reliabilities.prior], self.reliabilities.values])
        reliability = torch.from_numpy(known[numbers]).to(difference)
        probability = probability_meant(difference.detach(), preference, reliability)
        annotator = torch.from_numpy(numbers).to(difference.device)
        counts = count_meant(probability, annotator, (2.0 * preference - 1.0).abs(), len(known))
        return reliability, MeantLabels(counts.meant[1:], counts.labels[1:])

    def _rankings(self, rewards: Tensor, labels: np.ndarray, sizes: np.ndarray) -> tuple[Tensor, Diagnostics]:
        rewards, ranks = rewards[:, 0], labels[:, RANK]
        pairs = all_pairs(sizes)
        first, second = rewards[pairs.first], rewards[pairs.second]
        preference = torch.from_numpy(preference_of_ranks(ranks[pairs.first], ranks[pairs.second])).to(rewards)
        if self.config.ranking_loss == "all_pairs":
            losses = _mean_of_pairs(bradley_terry_loss(first, second, preference), pairs, len(sizes))
        else:
            losses = _RANKING_LOSSES[self.config.ranking_loss](rewards, ranks, sizes)
        losses = losses + self.config.centring * _mean_of_pairs(centring_penalty(first, second), pairs, len(sizes))
        return losses, _compare(losses, first - second, preference, _NO_LABELS)

    def _scores(self, rewards: Tensor, labels: np.ndarray) -> tuple[Tensor, Diagnostics]:
        ratings = torch.from_numpy(labels[:, VALUES:]).to(rewards)
        given = ~ratings.isnan()
        ratings = torch.where(given, ratings, torch.zeros_like(ratings))
        errors = torch.where(given, rewards - ratings, torch.zeros_like(ratings))
        losses = errors.square().sum(dim=1) / given.sum(dim=1).clamp(min=1)
        everything = torch.ones_like(losses, dtype=torch.bool)
        return losses, ScoreDiagnostics(
            summarise(losses, everything), summarise(errors, given), summarise(ratings, given)
        )


_RANKING_LOSSES = {"plackett_luce": plackett_luce_loss, "choice": choice_loss}
_NO_LABELS = MeantLabels(torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64))


@dataclass(frozen=True)
class ComparisonDiagnostics(Diagnostics):
    """Diagnostics of pairs and rankings."""

    loss: Summary
    correct: Summary
    margin: Summary
    meant: MeantLabels
    """For each annotator whose reliability is learned."""

    def metrics(self) -> dict[str, float]:
        """Mean loss of an element. For comparisons without ties also the share that is ordered correctly, and the mean margin
        between the rewards of the better and the worse response."""
        compared = {"accuracy": self.correct.mean, "margin": self.margin.mean} if self.correct.count > 0 else {}
        labels = float(self.meant.labels.sum())
        meant = {"labels_meant": float(self.meant.meant.sum()) / labels} if labels else {}
        return {"loss": self.loss.mean, **compared, **meant}


@dataclass(frozen=True)
class ScoreDiagnostics(Diagnostics):
    """Diagnostics of scores."""

    loss: Summary
    error: Summary
    rating: Summary

    def metrics(self) -> dict[str, float]:
        """Mean squared error, with the training ratings scaled to std 1, and the explained share of the ratings' variance."""
        spread = self.rating.variance
        explained = {"explained_variance": 1.0 - self.error.variance / spread} if spread > 0.0 else {}
        return {"loss": self.loss.mean, **explained}


def _compare(losses: Tensor, difference: Tensor, preference: Tensor, meant: MeantLabels) -> ComparisonDiagnostics:
    direction = 2.0 * preference - 1.0
    better = torch.sign(direction) * difference
    decided = direction != 0
    return ComparisonDiagnostics(
        summarise(losses, torch.ones_like(losses, dtype=torch.bool)),
        summarise(pair_accuracy(better, torch.zeros_like(better)), decided),
        summarise(better, decided),
        meant,
    )


def _mean_of_pairs(values: Tensor, pairs: Comparisons, elements: int) -> Tensor:
    """The mean over each element's pairs: [C] to [E]."""
    element, share = torch.from_numpy(pairs.element).to(values.device), torch.from_numpy(pairs.share).to(values)
    return values.new_zeros(elements).index_add(0, element, share * values)


def _element_means(values: Tensor, sizes: np.ndarray) -> Tensor:
    """The mean over each element's sequences: [b] to [E]."""
    element = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)).to(values.device)
    return values.new_zeros(len(sizes)).index_add(0, element, values) / torch.from_numpy(sizes).to(values)
