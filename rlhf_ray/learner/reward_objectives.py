"""The losses of a reward model, for each kind of feedback. Pure but for the model's forward pass and `observe`.

A sequence's labels are (group, annotator, what was said): group and annotator are numbers, 0 where there is none that counts;
what was said is (preference, margin) of a pair, (rank,) of a ranking, and a mark for each aspect, NaN where none was given.
The weight of an element stands at its first sequence. Invariant: an element's loss reads its own sequences only and its weight
is over the global minibatch, so the sum over micro-batches and ranks is the loss, however they are cut.
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
    """Loss and diagnostics of a micro-batch, by the kind configured."""

    def __init__(self, config: RewardModelConfig, heads: RewardHeads, annotators: int = 0) -> None:
        """`annotators`: how many there are numbers for, 1 to that; read where reliability is learned."""
        self.config, self.heads = config, heads
        settings = config.reliability
        self.reliabilities = settings and Reliabilities.start(
            annotators, settings.prior, settings.strength, settings.memory
        )

    def __call__(self, model: nn.Module, inputs: ModelInput, batch: Batch) -> tuple[Tensor, Diagnostics]:
        rewards, deltas = self._rewards(model(inputs), batch)
        term = {"pairs": self._pairs, "rankings": self._rankings, "scores": self._scores}[self.config.kind]
        losses, diagnostics = term(rewards, batch)
        if self.config.groups is not None:
            losses = losses + self.config.groups.shrinkage * _element_means(deltas.square().sum(dim=1), batch)
        starts = np.cumsum(batch.element_sizes) - batch.element_sizes
        return weighted_sum(losses, torch.from_numpy(batch.weights[starts]).to(losses)), diagnostics

    def observe(self, diagnostics: Diagnostics) -> None:
        """Called after a training step with what the whole minibatch, of all ranks, gave: the M-step of reliability."""
        if self.reliabilities is not None:
            self.reliabilities = self.reliabilities.after(diagnostics.meant)

    def _rewards(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """r_0 + δ_g and δ_g of each sequence's group, both [b, aspects]; δ is 0 for group 0."""
        outputs = outputs.reshape(len(outputs), -1, len(self.heads.weights))
        group = torch.from_numpy(batch.labels[:, GROUP].astype(np.int64)).to(outputs.device)
        deltas = outputs[torch.arange(len(outputs), device=outputs.device), group]
        deltas = torch.where((group > 0)[:, None], deltas, torch.zeros_like(deltas))
        return outputs[:, 0] + deltas, deltas

    def _pairs(self, rewards: Tensor, batch: Batch) -> tuple[Tensor, Diagnostics]:
        first, second = rewards[0::2, 0], rewards[1::2, 0]
        said = batch.labels[0::2]
        preference, margin = (torch.from_numpy(said[:, column]).to(first) for column in (PREFERENCE, MARGIN))
        reliability, meant = self._reliability(first - second, preference, said)
        losses = bradley_terry_loss(first, second, preference, self.config.margin * margin, reliability)
        losses = losses + self.config.centring * centring_penalty(first, second)
        return losses, _compare(losses, first - second, preference, meant)

    def _reliability(
        self, difference: Tensor, preference: Tensor, said: np.ndarray
    ) -> tuple[Tensor | None, MeantLabels]:
        """η of each pair's annotator, the prior's for number 0, and the E-step for those with a number."""
        if self.reliabilities is None:
            return None, _NOBODY
        numbers = said[:, ANNOTATOR].astype(np.int64)
        known = np.concatenate([[self.reliabilities.prior], self.reliabilities.values])
        reliability = torch.from_numpy(known[numbers]).to(difference)
        probability = probability_meant(difference.detach(), preference, reliability)
        annotator = torch.from_numpy(numbers).to(difference.device)
        everybody = count_meant(probability, annotator, (2.0 * preference - 1.0).abs(), len(known))
        return reliability, MeantLabels(everybody.meant[1:], everybody.labels[1:])

    def _rankings(self, rewards: Tensor, batch: Batch) -> tuple[Tensor, Diagnostics]:
        rewards, ranks, sizes = rewards[:, 0], batch.labels[:, RANK], batch.element_sizes
        pairs = all_pairs(sizes)
        first, second = rewards[pairs.first], rewards[pairs.second]
        preference = torch.from_numpy(preference_of_ranks(ranks[pairs.first], ranks[pairs.second])).to(rewards)
        if self.config.ranking_loss == "all_pairs":
            losses = _mean_of_pairs(bradley_terry_loss(first, second, preference), pairs, len(sizes))
        else:
            losses = _RANKING_LOSSES[self.config.ranking_loss](rewards, ranks, sizes)
        losses = losses + self.config.centring * _mean_of_pairs(centring_penalty(first, second), pairs, len(sizes))
        return losses, _compare(losses, first - second, preference, _NOBODY)

    def _scores(self, rewards: Tensor, batch: Batch) -> tuple[Tensor, Diagnostics]:
        marks = torch.from_numpy(batch.labels[:, VALUES:]).to(rewards)
        given = ~marks.isnan()
        marks = torch.where(given, marks, torch.zeros_like(marks))
        errors = torch.where(given, rewards - marks, torch.zeros_like(marks))
        losses = errors.square().sum(dim=1) / given.sum(dim=1).clamp(min=1)
        everything = torch.ones_like(losses, dtype=torch.bool)
        return losses, ScoreDiagnostics(
            summarise(losses, everything), summarise(errors, given), summarise(marks, given)
        )


_RANKING_LOSSES = {"plackett_luce": plackett_luce_loss, "choice": choice_loss}
_NOBODY = MeantLabels(torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64))


@dataclass(frozen=True)
class ComparisonDiagnostics(Diagnostics):
    """Of pairs and rankings."""

    loss: Summary
    correct: Summary
    margin: Summary
    meant: MeantLabels
    """Of each annotator whose reliability is learned."""

    def metrics(self) -> dict[str, float]:
        """Loss per element; over compared responses of which one was said to be better: share ordered right, and the mean
        difference of the better one's reward and the other's."""
        compared = {"accuracy": self.correct.mean, "margin": self.margin.mean} if self.correct.count > 0 else {}
        labels = float(self.meant.labels.sum())
        meant = {"labels_meant": float(self.meant.meant.sum()) / labels} if labels else {}
        return {"loss": self.loss.mean, **compared, **meant}


@dataclass(frozen=True)
class ScoreDiagnostics(Diagnostics):
    """Of marks."""

    loss: Summary
    error: Summary
    mark: Summary

    def metrics(self) -> dict[str, float]:
        """Mean squared error in standard deviations of the training marks, and the share of the marks' variance explained."""
        spread = self.mark.variance
        explained = {"explained_variance": 1.0 - self.error.variance / spread} if spread > 0.0 else {}
        return {"loss": self.loss.mean, **explained}


def _compare(losses: Tensor, difference: Tensor, preference: Tensor, meant: MeantLabels) -> ComparisonDiagnostics:
    said = 2.0 * preference - 1.0
    better = torch.sign(said) * difference
    decided = said != 0
    return ComparisonDiagnostics(
        summarise(losses, torch.ones_like(losses, dtype=torch.bool)),
        summarise(pair_accuracy(better, torch.zeros_like(better)), decided),
        summarise(better, decided),
        meant,
    )


def _mean_of_pairs(values: Tensor, pairs: Comparisons, elements: int) -> Tensor:
    """[C] to [E]: the mean over each element's pairs."""
    element, share = torch.from_numpy(pairs.element).to(values.device), torch.from_numpy(pairs.share).to(values)
    return values.new_zeros(elements).index_add(0, element, share * values)


def _element_means(values: Tensor, batch: Batch) -> Tensor:
    """[b] to [E]."""
    sizes = batch.element_sizes
    element = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)).to(values.device)
    return values.new_zeros(len(sizes)).index_add(0, element, values) / torch.from_numpy(sizes).to(values)
