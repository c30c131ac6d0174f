"""The reward-model stage: from what people said to a sequence-classification folder.

Invariants: the backbone is the fine-tuned policy's; the loss of the first step of a comparison is log 2; nothing about the
labels, but what `config.json` says, is needed to use the folder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
from torch import nn

from rlhf_ray.algorithms.diagnostics import Diagnostics
from rlhf_ray.algorithms.rankings import MOST_TIED
from rlhf_ray.algorithms.reliability import Reliabilities
from rlhf_ray.algorithms.reward_quality import longer_wins, measure_quality
from rlhf_ray.batch import Batch
from rlhf_ray.config.reward_model import RewardModelConfig
from rlhf_ray.config.run import RunConfig
from rlhf_ray.data.readers import DataError
from rlhf_ray.data.records import Edit, Ranking
from rlhf_ray.learner.planning import plan_micro_batches
from rlhf_ray.learner.reward_objectives import RewardObjective
from rlhf_ray.learner.sharded_model import ShardedModel
from rlhf_ray.models.heads import SequenceScores
from rlhf_ray.models.loading import load_reward_model, load_tokenizer
from rlhf_ray.stages.datasets import Datasets, Note, Split, dialogue_limit, fitting
from rlhf_ray.stages.feedback import Feedback, Lesson, decided_comparisons, pack_elements, pair_of_edit, plan_lesson
from rlhf_ray.stages.fit_state import FitState
from rlhf_ray.stages.supervised import Documents, SupervisedJob, run_supervised
from rlhf_ray.telemetry.run_folder import QUALITY, RunFolder


def run_reward_model(config: RunConfig, folder: RunFolder, model: str, data: Datasets, note: Note) -> FitState:
    """Learn a reward from the feedback of the configured kind, starting from the folder `model`."""
    settings, tokenizer = config.reward_model, load_tokenizer(model)
    records = feedback(settings, data)
    lesson = plan_lesson(settings, records.train)
    limit = dialogue_limit(config.data)
    batches = [
        pack_elements(fitting(lesson.encode(tokenizer, part, limit), settings.kind, limit, note))
        for part in (records.train, records.held_out)
    ]
    task = RewardTask(
        settings, lesson, longer_wins(batches[0].lengths, *decided_comparisons(batches[0], settings.kind))
    )
    job = SupervisedJob("reward_model", folder, model, settings, task, config.seed)
    return run_supervised(job, *batches)


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

    def __init__(self, config: RewardModelConfig, lesson: Lesson, longer_is_better: bool) -> None:
        """`longer_is_better`: what the training labels say of length, to hold the model against."""
        self.lesson, self.kind, self.longer_is_better = lesson, config.kind, longer_is_better
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
            `quality.json`, of held-out comparisons; nothing for marks.
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
        better, worse = decided_comparisons(held_out, self.kind)
        if not len(better):
            return {}
        rewards = np.empty(len(held_out))
        rewards[np.concatenate(everything)] = outputs.reshape(len(held_out), -1) @ self.lesson.heads.coefficients()
        quality = measure_quality(rewards, held_out.lengths, better, worse, self.longer_is_better)
        return {QUALITY: asdict(quality)}
