"""Trained reward models as a source of reward: one model, or an ensemble.

Invariants: each member is read at the last token, and its rewards are normalised before they are combined; sequences are scored
in micro-batches of tokens, never one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from rlhf_ray.algorithms.reward_quality import combine, disagreement
from rlhf_ray.batch import Batch, pack, pack_rollouts, pad
from rlhf_ray.config.reward import RewardConfig, RewardModelSource
from rlhf_ray.micro_batches import plan_micro_batches
from rlhf_ray.models.heads import SequenceScores
from rlhf_ray.models.loading import load_scalar_model
from rlhf_ray.models.packing import enable_packing
from rlhf_ray.models.reward_heads import normalisation
from rlhf_ray.rewards.answers import RewardError, check_scores
from rlhf_ray.rewards.http import UsageMeter
from rlhf_ray.types import Rollout


class EnsembleScore(NamedTuple):
    """The combined reward of several reward models."""

    value: float
    disagreement: float
    """Standard deviation of the members' normalised rewards."""


@dataclass
class _Member:
    scorer: SequenceScores
    mean: float
    std: float


class ModelReward:
    """Sequence-classification models, normalised by the statistics in their configs.

    For a model with several annotator groups: the consensus, or the group that `reward.model.group` names.
    """

    name = "model"
    meter: UsageMeter | None = None

    def __init__(
        self, paths: Sequence[str], source: RewardModelSource, config: RewardConfig, device: torch.device
    ) -> None:
        """`paths`: the folders of the members."""
        self.source, self.weight, self.device = source, source.weight, device
        self.budget, self.packing = config.micro_batch_tokens, config.packing
        self.members = [self._load(path, config) for path in paths]

    def score(self, rollouts: Sequence[Rollout]) -> Sequence[float | EnsembleScore | RewardError]:
        """One combined reward for each rollout, with the members' disagreement if there are several."""
        means, stds = (np.asarray([[getattr(m, name)] for m in self.members]) for name in ("mean", "std"))
        normalised = (self.raw(rollouts) - means) / stds
        answers = check_scores(self.name, combine(normalised, self.source.combine, self.source.penalty), rollouts)
        if len(self.members) == 1:
            return answers
        return [
            answer if isinstance(answer, RewardError) else EnsembleScore(answer, float(spread))
            for answer, spread in zip(answers, disagreement(normalised), strict=True)
        ]

    def raw(self, rollouts: Sequence[Rollout]) -> np.ndarray:
        """float64 [K, n]: the reward of each member, not normalised."""
        batch = pack_rollouts(rollouts)
        return np.stack(
            [score_sequences(m.scorer, batch, self.budget, self.device, self.packing) for m in self.members]
        )

    def normalise(self, statistics: Sequence[tuple[float, float]]) -> None:
        """Replace the members' means and standard deviations, one pair for each member."""
        for member, (mean, std) in zip(self.members, statistics, strict=True):
            member.mean, member.std = mean, std

    def _load(self, path: str, config: RewardConfig) -> _Member:
        model = load_scalar_model(path, config.dtype, config.attention, reading=self.source.group)
        scorer = SequenceScores(model.eval().to(self.device))
        if config.packing:
            enable_packing(model, scorer, exact=config.dtype == "fp32")
        return _Member(scorer, *normalisation(model.config))


@torch.inference_mode()
def score_sequences(
    scorer: SequenceScores, batch: Batch, token_budget: int, device: torch.device, packing: bool = False
) -> np.ndarray:
    """float64 [B]: raw scores of a head with one row. `packing`: whether the model reads packed sequences."""
    scores, lay_out = np.empty(len(batch)), pack if packing else pad
    for indices in plan_micro_batches(batch.lengths, 1, token_budget, packing=packing)[0]:
        scores[indices] = scorer(lay_out(batch.select(indices), device))[:, 0].float().cpu().numpy()
    return scores
