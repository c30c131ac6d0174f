"""The reward-model stage: from human feedback to a sequence-classification folder, and its normalisation before PPO.

Invariants: the backbone is the fine-tuned policy's; the loss of comparisons is log 2 at the first step; `config.json` holds
everything that is needed to use the folder; the reward is normalised on the policy's answers once in a run, before PPO's first
step, and a resumed run uses the same normalisation.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from rlhf_ray.algorithms.diagnostics import Diagnostics
from rlhf_ray.algorithms.preferences import MOST_TIED
from rlhf_ray.algorithms.reliability import Reliabilities
from rlhf_ray.algorithms.reward_quality import RewardQuality, disagreement, longer_wins, measure_quality
from rlhf_ray.batch import Batch, ModelInput
from rlhf_ray.config.reward import RewardModelSource
from rlhf_ray.config.run import RunConfig
from rlhf_ray.config.supervised import RewardModelConfig
from rlhf_ray.data.datasets import Datasets, Note, Split, dialogue_limit, fitting
from rlhf_ray.data.labels import (
    Feedback,
    LabelEncoder,
    build_label_encoder,
    decided_comparisons,
    pack_examples,
    pair_of_edit,
)
from rlhf_ray.data.records import Edit, Ranking
from rlhf_ray.data.rows import DataError
from rlhf_ray.learner.reward_objectives import RewardObjective
from rlhf_ray.learner.sharded_model import ShardedModel
from rlhf_ray.micro_batches import plan_micro_batches
from rlhf_ray.models.heads import SequenceScores
from rlhf_ray.models.loading import Dtype, load_reward_model, load_tokenizer
from rlhf_ray.models.reward_heads import SMALLEST_STD, normalisation, normalised_on, renormalise
from rlhf_ray.runs.run_folder import QUALITY, RunFolder, atomic_write
from rlhf_ray.runtime.stopping import StopRequest
from rlhf_ray.stages.supervised import run_supervised
from rlhf_ray.stages.supervised_job import Documents, FitState, SupervisedJob, Task
from rlhf_ray.types import Prompt, RolloutRequest, rollout_seed

if TYPE_CHECKING:  # the ranks load this module, and need nothing of the driver
    from rlhf_ray.driver.workers import Roles

HELD_OUT = "held_out_rewards.json"
"""File in the folder of an ensemble's member: its raw reward of every held-out response, and its normalisation."""


def run_reward_model(
    config: RunConfig, folder: RunFolder, model: str, data: Datasets, note: Note, stop: StopRequest | None = None
) -> FitState:
    """Train the reward model, or all members of an ensemble, from the folder `model`; returns how the first training ended."""
    settings, tokenizer = config.reward_model, load_tokenizer(model)
    records = feedback(settings, data)
    encoder = build_label_encoder(settings, records.train)
    limit = dialogue_limit(config.data)
    train, held_out = (
        fitting(encoder.encode(tokenizer, part, limit), settings.kind, limit, note)
        for part in (records.train, records.held_out)
    )
    train_batch, held_out_batch = pack_examples(train), pack_examples(held_out)
    longer_is_better = longer_wins(train_batch.lengths, *decided_comparisons(train_batch, settings.kind))
    annotators = AnnotatorIds(
        tuple(element.group for element in held_out), tuple(element.annotator for element in held_out)
    )
    results = []
    for member in range(1, settings.members + 1):
        task = RewardTask(settings, encoder, longer_is_better, annotators)
        seed = member_seed(config.seed, member)
        job = SupervisedJob("reward_model", folder, model, settings, task, seed, member, config.telemetry.wandb)
        results.append(run_supervised(job, train_batch, held_out_batch, stop))
    if settings.members > 1:
        quality = measure_ensemble(folder, settings, held_out_batch, longer_is_better, annotators)
        if quality is not None:
            atomic_write(folder.reward_ensemble, json.dumps(asdict(quality)) + "\n")
    return results[0]


def member_seed(seed: int, member: int) -> int:
    """The seed of a member's fresh head and data order. The first member has the run's seed."""
    return seed if member == 1 else rollout_seed("reward model", str(seed), member)


@dataclass(frozen=True)
class AnnotatorIds:
    """The annotator of each held-out element, and the annotator's group."""

    groups: tuple[str | None, ...]
    annotators: tuple[str | None, ...]

    def measure(self, rewards: np.ndarray, held_out: Batch, kind: str, longer_is_better: bool) -> RewardQuality | None:
        """The quality of rewards, float64 [sequences]; None if no label compares responses."""
        better, worse = decided_comparisons(held_out, kind)
        if not len(better):
            return None
        starts = held_out.element_starts
        assert starts is not None  # comparisons have elements of several sequences
        element = np.cumsum(starts)[better] - 1
        groups, annotators = ([names[index] for index in element] for names in (self.groups, self.annotators))
        return measure_quality(rewards, held_out.lengths, better, worse, longer_is_better, groups, annotators)


def measure_ensemble(
    folder: RunFolder, config: RewardModelConfig, held_out: Batch, longer_is_better: bool, annotators: AnnotatorIds
) -> RewardQuality | None:
    """The quality of the members' mean reward, and their disagreement; None if no label compares responses."""
    folders = [folder.reward_member(member) for member in range(1, config.members + 1)]
    members = [json.loads((path / HELD_OUT).read_text()) for path in folders]
    rewards = np.asarray([member["rewards"] for member in members])
    quality = annotators.measure(rewards.mean(axis=0), held_out, config.kind, longer_is_better)
    if quality is None:
        return None
    normalised = np.stack(
        [(row - member["mean"]) / member["std"] for row, member in zip(rewards, members, strict=True)]
    )
    return replace(quality, members=config.members, disagreement=float(disagreement(normalised).mean()))


def feedback(config: RewardModelConfig, data: Datasets) -> Split:
    """The records of the configured kind. Edits become pairs.

    Raises:
        DataError: there are none, or too many responses of a ranking share a rank for Plackett-Luce.
    """
    splits = [split for name in config.reads if (split := getattr(data, name)) is not None]
    if not splits:
        raise DataError(
            f"reward_model.kind {config.kind} needs data.{' or data.'.join(config.reads)}; the run has none"
        )
    train, held_out = ([r for split in splits for r in getattr(split, part)] for part in ("train", "held_out"))
    if config.kind == "rankings" and config.ranking_loss == "plackett_luce":
        _refuse_ties([*train, *held_out])
    return Split(tuple(map(_as_feedback, train)), tuple(map(_as_feedback, held_out)))


def _as_feedback(record: Feedback | Edit) -> Feedback:
    return pair_of_edit(record) if isinstance(record, Edit) else record


def _refuse_ties(rankings: Sequence[Ranking]) -> None:
    for number, ranking in enumerate(rankings, start=1):
        if max(Counter(ranking.ranks).values()) > MOST_TIED:
            raise DataError(
                f"ranking {number} has more than {MOST_TIED} of its {len(ranking.ranks)} responses on one rank, which is too "
                "many for reward_model.ranking_loss plackett_luce; use all_pairs"
            )


class RewardTask(Task):
    """Trains a reward model and, if configured, estimates the reliability of the annotators."""

    def __init__(
        self, config: RewardModelConfig, encoder: LabelEncoder, longer_is_better: bool, annotators: AnnotatorIds
    ) -> None:
        """`longer_is_better`: the training labels prefer the longer response in most comparisons (for `RewardQuality`)."""
        self.encoder, self.kind, self.longer_is_better = encoder, config.kind, longer_is_better
        self.annotators, self.in_ensemble = annotators, config.members > 1
        self.rewards = RewardObjective(config, encoder.heads, len(encoder.annotators))

    def load(self, model: str, dtype: Dtype, attention: str, seed: int) -> nn.Module:
        return SequenceScores(load_reward_model(model, self.encoder.heads, dtype, attention, seed))

    def objective(self, model: nn.Module, inputs: ModelInput, batch: Batch) -> tuple[Tensor, Diagnostics]:
        return self.rewards(model, inputs, batch)

    def observe(self, diagnostics: Diagnostics) -> None:
        """Update the reliability of the annotators."""
        self.rewards.observe(diagnostics)

    def state(self) -> Reliabilities | None:
        """The reliability of the annotators."""
        return self.rewards.reliabilities

    def restore(self, state: Reliabilities | None) -> None:
        self.rewards.reliabilities = state

    def finish(self, model: ShardedModel, held_out: Batch, micro_batch_tokens: int) -> Documents:
        """Write into the config what the rows mean, their normalisation on the held-out responses, and the reliabilities.

        Returns:
            `quality.json` if labels compare responses, and the rewards of a member of an ensemble.
        """
        (micro_batches,) = plan_micro_batches(held_out.lengths, 1, micro_batch_tokens)
        outputs = model.evaluate(held_out, micro_batches, lambda module, inputs: module(inputs))
        config, encoder = model.engine.module.model.config, self.encoder
        encoder.heads.write(config, outputs)
        aspects = encoder.heads.weights
        if encoder.scales:
            config.reward_marks = {a: {"mean": m, "std": s} for a, (m, s) in zip(aspects, encoder.scales, strict=True)}
        if self.rewards.reliabilities is not None:
            values = np.round(self.rewards.reliabilities.values, 4).tolist()
            config.annotator_reliability = dict(zip(encoder.annotators, values, strict=True))
        rewards = np.empty(len(held_out))
        rewards[np.concatenate(micro_batches)] = outputs.reshape(len(held_out), -1) @ encoder.heads.coefficients()
        quality = self.annotators.measure(rewards, held_out, self.kind, self.longer_is_better)
        documents: dict[str, Any] = {} if quality is None else {QUALITY: asdict(quality)}
        if self.in_ensemble:
            mean, std = normalisation(config)
            documents[HELD_OUT] = {"rewards": rewards.tolist(), "mean": mean, "std": std}
        return documents


def needs_normalising(source: RewardModelSource | None, members: Sequence[Path]) -> bool:
    """Whether the config asks for normalisation on the policy's answers, and these folders of the run's members lack it."""
    if source is None or source.paths or not source.normalise_on:
        return False
    return any(normalised_on(member, source.group) is None for member in members)


async def normalise_reward(
    source: RewardModelSource, members: Sequence[Path], roles: Roles, prompts: Sequence[Prompt]
) -> list[tuple[float, float]]:
    """Scale the reward to mean 0 and std 1 on answers of the policy that PPO starts from, here and in the members' folders.

    Algorithms 1.12: mean from "The N+ Implementation Details of RLHF" (arXiv 2403.17031), std from the code of Ziegler et al.
    (arXiv 1909.08593), both on samples of the reference policy.

    Returns:
        Mean and std of each member's raw reward.
    """
    assert roles.reward is not None
    requests = [RolloutRequest(prompt, 0, rollout_seed("normalisation", prompt.id, 0)) for prompt in prompts]
    rewards = await roles.raw_rewards(await roles.rollouts(requests))
    statistics = [(float(row.mean()), float(max(row.std(), SMALLEST_STD))) for row in rewards]
    for member, (mean, std) in zip(members, statistics, strict=True):
        renormalise(member, source.group, mean, std, f"{len(prompts)} answers of the policy that PPO started from")
    await roles.reward.ask_all("normalise", statistics)
    return statistics
