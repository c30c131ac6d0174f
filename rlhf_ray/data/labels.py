"""From what people said to the batch that a reward model trains on.

Invariants: what is learned (groups, annotators, the scale of marks) is decided from the training records alone; a sequence
ends behind its last end-of-sequence token, where rollouts end, too; an element that does not fit is left out whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_ray.algorithms.preferences import all_pairs, preference_of_ranks
from rlhf_ray.batch import Batch, pack_sequences
from rlhf_ray.config.supervised import RewardModelConfig
from rlhf_ray.data.limits import Encoded, LengthLimit, fit
from rlhf_ray.data.readers import DataError
from rlhf_ray.data.records import Edit, Messages, Pair, Ranking, Scored
from rlhf_ray.data.tokenize import encode_dialogue
from rlhf_ray.learner.reward_objectives import PREFERENCE, RANK
from rlhf_ray.models.reward_heads import MEAN_OF_GROUPS, RewardHeads

Feedback = Pair | Ranking | Scored


@dataclass(frozen=True, eq=False)
class Element:
    """One label and the sequences that it is about."""

    sequences: tuple[np.ndarray, ...]
    """int32 [T_i] each: prompt and response."""
    labels: np.ndarray
    """float32 [sequences, k], see `learner.reward_objectives`."""
    weight: float
    group: str | None = None
    """Of the annotator, if known."""
    annotator: str | None = None

    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(map(len, self.sequences))


@dataclass(frozen=True)
class LabelEncoder:
    """What is learned from the training records, and how their labels are written down."""

    heads: RewardHeads
    annotators: tuple[str, ...] = ()
    """Those whose reliability is learned; number 1 is the first."""
    scales: tuple[tuple[float, float], ...] = ()
    """Scores: mean and std of the training marks of each aspect."""

    @cached_property
    def _groups(self) -> dict[str, int]:
        """Numbers from 1."""
        return {name: number for number, name in enumerate(self.heads.groups, start=1)}

    @cached_property
    def _annotators(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.annotators, start=1)}

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, records: Sequence[Feedback], limit: LengthLimit
    ) -> Encoded[Element]:
        """Elements all of whose sequences are within the limit; what says nothing is no element."""
        return fit(filter(self._concerns, records), partial(self._element, tokenizer), Element.longest, limit)

    def _concerns(self, record: Feedback) -> bool:
        """Whether a record says anything that is learned: not if its weight is 0, or its marks are of other aspects."""
        return record.weight > 0 and (
            not isinstance(record, Scored) or not record.scores.keys().isdisjoint(self.heads.weights)
        )

    def _element(self, tokenizer: PreTrainedTokenizerBase, record: Feedback) -> Element:
        responses, said = _said(record, self)
        sequences = tuple(
            _up_to_end(encode_dialogue(tokenizer, record.prompt + response).token_ids, tokenizer.eos_token_id)
            for response in responses
        )
        who = [self._groups.get(record.group, 0), self._annotators.get(record.annotator, 0)]
        labels = np.asarray([[*who, *row] for row in said], dtype=np.float32)
        return Element(sequences, labels, record.weight, record.group, record.annotator)


def plan_lesson(config: RewardModelConfig, train: Sequence[Feedback]) -> LabelEncoder:
    """What there is to learn.

    Raises:
        DataError: no record has an aspect that is to be learned, no group has labels enough, or a group has a reserved name.
    """
    groups = _groups(config, train)
    annotators = sorted({r.annotator for r in train if r.annotator is not None}) if config.reliability else ()
    if config.kind != "scores":
        return LabelEncoder(RewardHeads({"reward": 1.0}, groups), tuple(annotators))
    scales = tuple(_scale(aspect, train) for aspect in config.aspects)
    return LabelEncoder(RewardHeads(config.aspects, groups), scales=scales)


def pair_of_edit(edit: Edit) -> Pair:
    """The edited answer was preferred to the original."""
    return Pair(edit.prompt, edit.edited, edit.original, edit.metadata, edit.annotator, edit.group, weight=edit.weight)


def pack_elements(elements: Sequence[Element]) -> Batch:
    """The sequences of all elements end to end, with their labels.

    The single target of a sequence is its last token. An element's weight stands at its first sequence, 0 at the others.
    """
    sequences = [sequence for element in elements for sequence in element.sequences]
    starts = np.concatenate([np.arange(len(element.sequences)) == 0 for element in elements])
    weights = np.repeat([element.weight for element in elements], [len(element.sequences) for element in elements])
    batch = pack_sequences(sequences, [np.arange(len(s)) == len(s) - 1 for s in sequences])
    return Batch(
        batch.token_ids,
        batch.lengths,
        batch.target_mask,
        weights=(weights * starts).astype(np.float32),
        element_starts=starts,
        labels=np.concatenate([element.labels for element in elements]),
    )


def decided_comparisons(batch: Batch, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """int64 [c] each: the better and the worse sequence of every comparison that says which is which; none for marks."""
    if kind == "scores":
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    pairs = all_pairs(batch.element_sizes)
    if kind == "rankings":
        preference = preference_of_ranks(batch.labels[pairs.first, RANK], batch.labels[pairs.second, RANK])
    else:
        preference = batch.labels[pairs.first, PREFERENCE]
    decided = preference != 0.5
    first, second, forward = pairs.first[decided], pairs.second[decided], preference[decided] > 0.5
    return np.where(forward, first, second), np.where(forward, second, first)


def _said(record: Feedback, lesson: LabelEncoder) -> tuple[tuple[Messages, ...], Iterator[tuple[float, ...]]]:
    """The responses that a label is about, and what it says of each."""
    if isinstance(record, Pair):
        said = (record.preference, record.margin or 0.0)
        return (record.chosen, record.rejected), iter((said, said))
    if isinstance(record, Ranking):
        return record.responses, ((float(rank),) for rank in record.ranks)
    marks = tuple(
        (record.scores[aspect] - mean) / std if aspect in record.scores else float("nan")
        for aspect, (mean, std) in zip(lesson.heads.weights, lesson.scales, strict=True)
    )
    return (record.response,), iter((marks,))


def _groups(config: RewardModelConfig, train: Sequence[Feedback]) -> tuple[str, ...]:
    if config.groups is None:
        return ()
    labels = Counter(record.group for record in train if record.group is not None)
    groups = tuple(sorted(group for group, count in labels.items() if count >= config.groups.minimum_labels))
    if not groups:
        seen = ", ".join(f"{group} {count}" for group, count in labels.most_common(8)) or "none names one"
        raise DataError(
            f"reward_model.groups: no annotator group has {config.groups.minimum_labels} training labels ({seen}); lower "
            "reward_model.groups.minimum_labels, or remove reward_model.groups"
        )
    if MEAN_OF_GROUPS in groups:
        raise DataError(
            f"an annotator group is called {MEAN_OF_GROUPS!r}, which means all of them; give it another name"
        )
    return groups


def _scale(aspect: str, train: Sequence[Scored]) -> tuple[float, float]:
    marks = np.asarray([record.scores[aspect] for record in train if aspect in record.scores])
    if not len(marks) or marks.std() == 0:
        known = ", ".join(sorted({name for record in train for name in record.scores}))
        raise DataError(
            f"reward_model.aspects: {aspect!r} has {'equal marks' if len(marks) else 'no mark'} in all training records, "
            f"which have {known}; remove it from reward_model.aspects"
        )
    return float(marks.mean()), float(marks.std())


def _up_to_end(token_ids: np.ndarray, eos: int) -> np.ndarray:
    ends = np.flatnonzero(token_ids == eos)
    return token_ids[: ends[-1] + 1] if len(ends) else token_ids
