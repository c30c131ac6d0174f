"""From feedback records to the batch that a reward model trains on.

Invariants: groups, annotators and the scale of ratings are taken from the training records alone; a sequence ends after its last
end-of-sequence token, as rollouts do; an example that is too long is left out as a whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_ray.algorithms.preferences import PREFERENCE, RANK, all_pairs, preference_of_ranks
from rlhf_ray.batch import Batch, pack_sequences
from rlhf_ray.config.supervised import RewardModelConfig
from rlhf_ray.data.limits import Encoded, LengthLimit, fit
from rlhf_ray.data.records import Edit, Messages, Pair, Ranking, Scored
from rlhf_ray.data.rows import DataError
from rlhf_ray.data.tokenize import encode_dialogue
from rlhf_ray.models.reward_heads import MEAN_OF_GROUPS, RewardHeads

Feedback = Pair | Ranking | Scored


@dataclass(frozen=True, eq=False)
class LabeledExample:
    """One label and the sequences that it rates or compares."""

    sequences: tuple[np.ndarray, ...]
    """int32 [T_i] each: prompt and response."""
    labels: np.ndarray
    """float32 [sequences, k]: group, annotator and the label's values (`algorithms.preferences`)."""
    weight: float
    group: str | None = None
    """Group of the annotator, if known."""
    annotator: str | None = None

    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(map(len, self.sequences))


@dataclass(frozen=True)
class LabelEncoder:
    """The rewards to learn, and the encoding of labels as numbers."""

    heads: RewardHeads
    annotators: tuple[str, ...] = ()
    """Annotators whose reliability is learned; the first has number 1."""
    scales: tuple[tuple[float, float], ...] = ()
    """Kind scores: mean and standard deviation of the training ratings of each aspect."""

    @cached_property
    def _groups(self) -> dict[str, int]:
        """Numbers from 1."""
        return {name: number for number, name in enumerate(self.heads.groups, start=1)}

    @cached_property
    def _annotators(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.annotators, start=1)}

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, records: Sequence[Feedback], limit: LengthLimit
    ) -> Encoded[LabeledExample]:
        """The examples whose sequences are all within the limit. Records without a label to learn are skipped."""
        return fit(filter(self._is_learned, records), partial(self._example, tokenizer), LabeledExample.longest, limit)

    def _is_learned(self, record: Feedback) -> bool:
        """Whether a record has a positive weight and, for scores, a rating of a learned aspect."""
        return record.weight > 0 and (
            not isinstance(record, Scored) or not record.scores.keys().isdisjoint(self.heads.weights)
        )

    def _example(self, tokenizer: PreTrainedTokenizerBase, record: Feedback) -> LabeledExample:
        responses, values = self._responses_and_values(record)
        sequences = tuple(
            _up_to_end(encode_dialogue(tokenizer, record.prompt + response).token_ids, tokenizer.eos_token_id)
            for response in responses
        )
        who = [_number(self._groups, record.group), _number(self._annotators, record.annotator)]
        labels = np.asarray([[*who, *row] for row in values], dtype=np.float32)
        return LabeledExample(sequences, labels, record.weight, record.group, record.annotator)

    def _responses_and_values(self, record: Feedback) -> tuple[tuple[Messages, ...], list[tuple[float, ...]]]:
        """The responses of a label, and its values for each of them."""
        if isinstance(record, Pair):
            return (record.chosen, record.rejected), [(record.preference, record.margin or 0.0)] * 2
        if isinstance(record, Ranking):
            return record.responses, [(float(rank),) for rank in record.ranks]
        ratings = tuple(
            (record.scores[aspect] - mean) / std if aspect in record.scores else float("nan")
            for aspect, (mean, std) in zip(self.heads.weights, self.scales, strict=True)
        )
        return (record.response,), [ratings]


def build_label_encoder(config: RewardModelConfig, train: Sequence[Feedback]) -> LabelEncoder:
    """The encoder for the training records.

    Raises:
        DataError: an aspect has no ratings to learn from, no group has enough labels, or a group has a reserved name.
    """
    groups = _groups(config, train)
    annotators = sorted({r.annotator for r in train if r.annotator is not None}) if config.reliability else ()
    if config.kind != "scores":
        return LabelEncoder(RewardHeads({"reward": 1.0}, groups), tuple(annotators))
    rated = [record for record in train if isinstance(record, Scored)]
    scales = tuple(_scale(aspect, rated) for aspect in config.aspects)
    return LabelEncoder(RewardHeads(config.aspects, groups), scales=scales)


def pair_of_edit(edit: Edit) -> Pair:
    """An edit as a pair: the edited answer is preferred to the original."""
    return Pair(edit.prompt, edit.edited, edit.original, edit.metadata, edit.annotator, edit.group, weight=edit.weight)


def pack_examples(examples: Sequence[LabeledExample]) -> Batch:
    """The sequences of all examples end to end, with their labels. An example is an element of the batch.

    The only target of a sequence is its last token. An example's weight is at its first sequence; the others have 0.
    """
    sequences = [sequence for example in examples for sequence in example.sequences]
    starts = np.concatenate([np.arange(len(example.sequences)) == 0 for example in examples])
    weights = np.repeat([example.weight for example in examples], [len(example.sequences) for example in examples])
    batch = pack_sequences(sequences, [np.arange(len(s)) == len(s) - 1 for s in sequences])
    return Batch(
        batch.token_ids,
        batch.lengths,
        batch.target_mask,
        weights=(weights * starts).astype(np.float32),
        element_starts=starts,
        labels=np.concatenate([example.labels for example in examples]),
    )


def decided_comparisons(batch: Batch, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """int64 [c] each: the better and the worse sequence of every comparison without a tie. Kind scores has none."""
    if kind == "scores" or batch.labels is None:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    pairs = all_pairs(batch.element_sizes)
    if kind == "rankings":
        preference = preference_of_ranks(batch.labels[pairs.first, RANK], batch.labels[pairs.second, RANK])
    else:
        preference = batch.labels[pairs.first, PREFERENCE]
    decided = preference != 0.5
    first, second, forward = pairs.first[decided], pairs.second[decided], preference[decided] > 0.5
    return np.where(forward, first, second), np.where(forward, second, first)


def _number(numbers: dict[str, int], name: str | None) -> int:
    """0 for a name that is unknown or not given."""
    return 0 if name is None else numbers.get(name, 0)


def _groups(config: RewardModelConfig, train: Sequence[Feedback]) -> tuple[str, ...]:
    if config.groups is None:
        return ()
    labels = Counter(record.group for record in train if record.group is not None)
    groups = tuple(sorted(group for group, count in labels.items() if count >= config.groups.minimum_labels))
    if not groups:
        seen = ", ".join(f"{group} {count}" for group, count in labels.most_common(8)) or "no label names a group"
        raise DataError(
            f"reward_model.groups: no annotator group has {config.groups.minimum_labels} training labels ({seen}); lower "
            "reward_model.groups.minimum_labels, or remove reward_model.groups"
        )
    if MEAN_OF_GROUPS in groups:
        raise DataError(
            f"an annotator group is called {MEAN_OF_GROUPS!r}, which is reserved for the mean of all groups; rename it"
        )
    return groups


def _scale(aspect: str, train: Sequence[Scored]) -> tuple[float, float]:
    ratings = np.asarray([record.scores[aspect] for record in train if aspect in record.scores])
    if not len(ratings) or ratings.std() == 0:
        known = ", ".join(sorted({name for record in train for name in record.scores}))
        raise DataError(
            f"reward_model.aspects: {aspect!r} has {'equal ratings' if len(ratings) else 'no rating'} in all training records, "
            f"which have {known}; remove it from reward_model.aspects"
        )
    return float(ratings.mean()), float(ratings.std())


def _up_to_end(token_ids: np.ndarray, eos: int) -> np.ndarray:
    ends = np.flatnonzero(token_ids == eos)
    return token_ids[: ends[-1] + 1] if len(ends) else token_ids
