"""The reward-model stage: from what people said to a sequence-classification folder.

Invariants: the backbone is the fine-tuned policy's; the loss of the first step of a comparison is log 2; nothing about the
labels, but what `config.json` says, is needed to use the folder.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from torch import nn

from rlhf_ray.algorithms.diagnostics import Diagnostics
from rlhf_ray.algorithms.preferences import MOST_TIED
from rlhf_ray.algorithms.reliability import Reliabilities
from rlhf_ray.algorithms.reward_quality import RewardQuality, disagreement, longer_wins, measure_quality
from rlhf_ray.batch import Batch
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
from rlhf_ray.data.readers import DataError
from rlhf_ray.data.records import Edit, Ranking
from rlhf_ray.learner.reward_objectives import RewardObjective
from rlhf_ray.learner.sharded_model import ShardedModel
from rlhf_ray.micro_batches import plan_micro_batches
from rlhf_ray.models.heads import SequenceScores
from rlhf_ray.models.loading import load_reward_model, load_tokenizer
from rlhf_ray.models.reward_heads import normalisation
from rlhf_ray.runs.run_folder import QUALITY, RunFolder, atomic_write
from rlhf_ray.runtime.stopping import StopRequest
from rlhf_ray.stages.supervised import Documents, FitState, SupervisedJob, run_supervised
from rlhf_ray.types import rollout_seed

HELD_OUT = "held_out_rewards.json"
"""In the folder of an ensemble's member: its raw reward of every held-out response, with its normalisation."""


def run_reward_model(
    config: RunConfig, folder: RunFolder, model: str, data: Datasets, note: Note, stop: StopRequest | None = None
) -> FitState:
    """Learn a reward from the feedback of the configured kind, starting from the folder `model`."""
    settings, tokenizer = config.reward_model, load_tokenizer(model)
    records = feedback(settings, data)
    lesson = build_label_encoder(settings, records.train)
    limit = dialogue_limit(config.data)
    train, held_out = (
        fitting(lesson.encode(tokenizer, part, limit), settings.kind, limit, note)
        for part in (records.train, records.held_out)
    )
    batches = pack_examples(train), pack_examples(held_out)
    longer_is_better = longer_wins(batches[0].lengths, *decided_comparisons(batches[0], settings.kind))
    judges = AnnotatorIds(
        tuple(element.group for element in held_out), tuple(element.annotator for element in held_out)
    )
    for member in range(1, settings.members + 1):
        task = RewardTask(settings, lesson, longer_is_better, judges)
        seed = member_seed(config.seed, member)
        job = SupervisedJob("reward_model", folder, model, settings, task, seed, member, config.telemetry.wandb)
        fit = run_supervised(job, *batches, stop)
        if member == 1:
            first = fit
    if settings.members > 1:
        measured = measure_ensemble(folder, settings, batches[1], longer_is_better, judges)
        if measured is not None:
            atomic_write(folder.reward_ensemble, json.dumps(asdict(measured)) + "\n")
    return first


def member_seed(seed: int, member: int) -> int:
    """Of a member's fresh head and of the order of its data; the first member has the run's."""
    return seed if member == 1 else rollout_seed("reward model", str(seed), member)


@dataclass(frozen=True)
class AnnotatorIds:
    """Whose label each held-out element is."""

    groups: tuple[str | None, ...]
    annotators: tuple[str | None, ...]

    def measure(self, rewards: np.ndarray, held_out: Batch, kind: str, longer_is_better: bool) -> RewardQuality | None:
        """How good float64 [sequences] rewards are; None where no label compares."""
        better, worse = decided_comparisons(held_out, kind)
        if not len(better):
            return None
        element = np.cumsum(held_out.element_starts)[better] - 1
        groups, annotators = ([names[index] for index in element] for names in (self.groups, self.annotators))
        return measure_quality(rewards, held_out.lengths, better, worse, longer_is_better, groups, annotators)


def measure_ensemble(
    folder: RunFolder, config: RewardModelConfig, held_out: Batch, longer_is_better: bool, judges: AnnotatorIds
) -> RewardQuality | None:
    """How good the mean of all members is, and how far they are apart; None where no label compares."""
    folders = [folder.reward_member(member) for member in range(1, config.members + 1)]
    said = [json.loads((path / HELD_OUT).read_text()) for path in folders]
    rewards = np.asarray([member["rewards"] for member in said])
    quality = judges.measure(rewards.mean(axis=0), held_out, config.kind, longer_is_better)
    if quality is None:
        return None
    normalised = np.stack([(row - member["mean"]) / member["std"] for row, member in zip(rewards, said, strict=True)])
    apart = float(disagreement(normalised).mean())
    return replace(quality, members=config.members, disagreement=apart)


def feedback(config: RewardModelConfig, data: Datasets) -> Split:
    """The records of the configured kind. Edits are pairs.

    Raises:
        DataError: there are none, or more responses of a ranking share a place than Plackett-Luce allows.
    """
    splits = [split for name in config.reads if (split := getattr(data, name)) is not None]
    if not splits:
        raise DataError(
            f"reward_model.kind {config.kind} needs data.{' or data.'.join(config.reads)}; the run has none"
        )
    train, held_out = ([r for split in splits for r in getattr(split, part)] for part in ("train", "held_out"))
    if config.kind == "rankings" and config.ranking_loss == "plackett_luce":
        _refuse_crowds([*train, *held_out])
    return Split(tuple(map(_as_feedback, train)), tuple(map(_as_feedback, held_out)))


def _as_feedback(record: Feedback | Edit) -> Feedback:
    return pair_of_edit(record) if isinstance(record, Edit) else record


def _refuse_crowds(rankings: Sequence[Ranking]) -> None:
    for number, ranking in enumerate(rankings, start=1):
        if max(Counter(ranking.ranks).values()) > MOST_TIED:
            raise DataError(
                f"ranking {number} has more than {MOST_TIED} of its {len(ranking.ranks)} responses on one place, which "
                "reward_model.ranking_loss plackett_luce cannot sum over; use all_pairs"
            )


class RewardTask:
    """A reward model, and what is learned beside it of the people whose labels it learns from."""

    def __init__(
        self, config: RewardModelConfig, lesson: LabelEncoder, longer_is_better: bool, judges: AnnotatorIds
    ) -> None:
        """`longer_is_better`: what the training labels say of length, to hold the model against."""
        self.lesson, self.kind, self.longer_is_better = lesson, config.kind, longer_is_better
        self.judges, self.in_ensemble = judges, config.members > 1
        self.objective = RewardObjective(config, lesson.heads, len(lesson.annotators))

    def load(self, model: str, dtype: str, attention: str, seed: int) -> nn.Module:
        """A backbone with a row for each thing to learn."""
        return SequenceScores(load_reward_model(model, self.lesson.heads, dtype, attention, seed))

    def observe(self, diagnostics: Diagnostics) -> None:
        """Learn whom to believe."""
        self.objective.observe(diagnostics)

    def state(self) -> Reliabilities | None:
        """What is believed of the annotators."""
        return self.objective.reliabilities

    def restore(self, state: Reliabilities | None) -> None:
        """Believe it again."""
        self.objective.reliabilities = state

    def finish(self, model: ShardedModel, held_out: Batch, micro_batch_tokens: int) -> Documents:
        """Write what the rows mean, their normalisation on the held-out responses, and what was learned of annotators.

        Returns:
            `quality.json`, of held-out comparisons; nothing for marks. Of a member of an ensemble its rewards, too.
        """
        (everything,) = plan_micro_batches(held_out.lengths, 1, micro_batch_tokens).micro_batches
        outputs = model.evaluate(held_out, everything, lambda module, padded: module(padded))
        config = model.engine.module.model.config
        self.lesson.heads.write(config, outputs)
        aspects = self.lesson.heads.weights
        if self.lesson.scales:
            config.reward_marks = {
                a: {"mean": m, "std": s} for a, (m, s) in zip(aspects, self.lesson.scales, strict=True)
            }
        if self.objective.reliabilities is not None:
            values = np.round(self.objective.reliabilities.values, 4).tolist()
            config.annotator_reliability = dict(zip(self.lesson.annotators, values, strict=True))
        rewards = np.empty(len(held_out))
        rewards[np.concatenate(everything)] = outputs.reshape(len(held_out), -1) @ self.lesson.heads.coefficients()
        quality = self.judges.measure(rewards, held_out, self.kind, self.longer_is_better)
        documents = {} if quality is None else {QUALITY: asdict(quality)}
        if self.in_ensemble:
            mean, std = normalisation(config)
            documents[HELD_OUT] = {"rewards": rewards.tolist(), "mean": mean, "std": std}
        return documents
