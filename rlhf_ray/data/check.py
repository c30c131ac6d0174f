"""What there is to know of a data file before anything trains on it: counts, lengths, duplicates, leaks, biases. Pure.

Invariants: a file is read once for every kind of record that its format holds; texts are compared as they are and normalised
(case, white space, punctuation), since a copy with another full stop leaks as much.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_ray.data.formats import PARSERS, Format, detect_format
from rlhf_ray.data.limits import Record
from rlhf_ray.data.records import Demonstration, Edit, Messages, Pair, PromptRecord, Ranking, Scored
from rlhf_ray.data.rows import DataError, Malformed, Row, load_rows
from rlhf_ray.data.tokenize import Dialogue, encode_dialogue, encode_prompt
from rlhf_ray.models.loading import check_model_folder, load_tokenizer, local_folder

_ORDER = ("rankings", "pairs", "scores", "edits", "demonstrations", "prompts")
"""A format's main kind is the first of these that it holds: the others follow from it."""


@dataclass(frozen=True)
class Contents:
    """One source, read."""

    format: Format
    kinds: tuple[str, ...]
    """Kinds of records that the format holds, the main one first."""
    records: tuple[Record, ...]
    """Of the main kind."""
    malformed: tuple[Malformed, ...]


@dataclass(frozen=True)
class Lengths:
    """Of texts, in characters or tokens."""

    median: float
    p95: float
    longest: int


@dataclass(frozen=True)
class PairFigures:
    """Of choices between two."""

    ties: int
    soft: int
    """Labels between a tie and a clear choice."""
    conflicting: int
    """Choices that another row contradicts: the same two answers, the other way round."""
    longer_chosen: float | None
    """Share of decided pairs with answers of different lengths whose longer one was chosen; ½ is no bias."""


@dataclass(frozen=True)
class Leaks:
    """Rows whose prompt is in the other source, too."""

    exact: int
    """Word for word,"""
    normalised: int
    """or but for case, white space and punctuation; these include the former."""


@dataclass(frozen=True)
class Flaw:
    """A malformed line."""

    place: str
    reason: str


@dataclass(frozen=True)
class Check:
    """Everything that `data check` says of a source, for people and programs."""

    format: Format
    kinds: tuple[str, ...]
    rows: int
    """Readable ones."""
    malformed: tuple[Flaw, ...]
    prompts: Lengths
    """Characters."""
    answers: Lengths | None
    """Characters."""
    repeated_prompts: int
    """Rows whose prompt an earlier row has."""
    repeated_rows: int
    """Rows that say what an earlier row says."""
    leaks: Leaks | None
    """None: there is no other source."""
    annotators: dict[str, int]
    groups: dict[str, int]
    pairs: PairFigures | None


def read_all(location: str, format: Format = "auto", split: str = "train", subset: str | None = None) -> Contents:
    """All rows of a source as records of its main kind; malformed ones are kept as such.

    Raises:
        FileNotFoundError: there is no such file. DataError: there is no readable row at all.
    """
    records: list[Record] = []
    malformed: list[Malformed] = []
    for row in load_rows(location, split, subset):
        if isinstance(row, Row):
            try:
                format = detect_format(row.value) if format == "auto" else format
                records.append(PARSERS[_kinds(format)[0]][format](row.value))
            except ValueError as error:
                malformed.append(row.malformed(str(error)))
        else:
            malformed.append(row)
    if not records:
        first = f"; {malformed[0].place}: {malformed[0].reason}" if malformed else ""
        raise DataError(f"{location}: no readable row among {len(malformed)}{first}")
    return Contents(format, _kinds(format), tuple(records), tuple(malformed))


def check(contents: Contents, against: Contents | None = None) -> Check:
    """The figures of a source, and what it shares with another one."""
    records = contents.records
    prompts = [prompt_of(record) for record in records]
    answers = [_text(answer) for record in records for answer in answers_of(record)]
    keys = Counter(_key(prompt) for prompt in prompts)
    return Check(
        format=contents.format,
        kinds=contents.kinds,
        rows=len(records),
        malformed=tuple(Flaw(line.place, line.reason) for line in contents.malformed),
        prompts=lengths([len(_text(prompt)) for prompt in prompts]),
        answers=lengths([len(answer) for answer in answers]) if answers else None,
        repeated_prompts=len(prompts) - len(keys),
        repeated_rows=len(records) - len({_content(record) for record in records}),
        leaks=None if against is None else _leaks(prompts, [prompt_of(record) for record in against.records]),
        annotators=_named(records, "annotator"),
        groups=_named(records, "group"),
        pairs=_pair_figures([r for r in records if isinstance(r, Pair)]) if contents.kinds[0] == "pairs" else None,
    )


def prompt_of(record: Record) -> Messages:
    """What was to be answered."""
    if isinstance(record, Demonstration):
        return record.messages[:-1]
    return record.messages if isinstance(record, PromptRecord) else record.prompt


def answers_of(record: Record) -> tuple[Messages, ...]:
    """What answers it, if anything."""
    if isinstance(record, Demonstration):
        return (record.messages[-1:],)
    if isinstance(record, Pair):
        return record.chosen, record.rejected
    if isinstance(record, Ranking):
        return record.responses
    if isinstance(record, Edit):
        return record.original, record.edited
    return (record.response,) if isinstance(record, Scored) else ()


def lengths(sizes: Sequence[int]) -> Lengths:
    """Median, 95th percentile and maximum."""
    return Lengths(float(np.median(sizes)), float(np.percentile(sizes, 95)), max(sizes))


def _kinds(format: Format) -> tuple[str, ...]:
    return tuple(kind for kind in _ORDER if format in PARSERS[kind])


def _leaks(prompts: Sequence[Messages], elsewhere: Sequence[Messages]) -> Leaks:
    return Leaks(*(sum(map(set(map(key, elsewhere)).__contains__, map(key, prompts))) for key in (_key, _normalised)))


def _pair_figures(pairs: Sequence[Pair]) -> PairFigures:
    decided = [p for p in pairs if p.preference != 0.5]
    better = [(p.chosen, p.rejected) if p.preference > 0.5 else (p.rejected, p.chosen) for p in decided]
    choices = Counter((_key(p.prompt), _key(good), _key(bad)) for p, (good, bad) in zip(decided, better, strict=True))
    conflicting = sum(count for (prompt, one, other), count in choices.items() if (prompt, other, one) in choices)
    differences = np.asarray([len(_text(good)) - len(_text(bad)) for good, bad in better])
    differing = differences[differences != 0]
    longer = float((differing > 0).mean()) if len(differing) else None
    soft = sum(p.preference not in (0.0, 0.5, 1.0) for p in pairs)
    return PairFigures(len(pairs) - len(decided), soft, conflicting, longer)


def _named(records: Iterable[Record], field: str) -> dict[str, int]:
    names = Counter(name for record in records if (name := getattr(record, field, None)) is not None)
    return dict(names.most_common())


def _text(messages: Messages) -> str:
    return "\n".join(turn["content"] for turn in messages)


def _key(messages: Messages) -> tuple[tuple[str, str], ...]:
    return tuple((turn["role"], turn["content"]) for turn in messages)


def _content(record: Record) -> tuple:
    """What a row says, without who said it and its id."""
    said = (getattr(record, name, None) for name in ("preference", "ranks"))
    marks = tuple(sorted(getattr(record, "scores", {}).items()))
    return _key(prompt_of(record)), tuple(map(_key, answers_of(record))), *said, marks


def _normalised(messages: Messages) -> str:
    return " ".join(re.findall(r"\w+", _text(messages).casefold()))


@dataclass(frozen=True)
class TokenCounts:
    """Of whole dialogues: a prompt with one answer, or without where there is none."""

    dialogues: Lengths
    prompts: Lengths
    learned: float
    """Share of the dialogues' tokens that the assistant says: those that a fine-tuning learns."""
    too_long: int | None
    """Records with a dialogue above the limit."""


def load_for_counting(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub name. Raises NotAModel."""
    folder = local_folder(model)
    check_model_folder(folder, "--model")
    return load_tokenizer(folder)


def count_tokens(tokenizer: PreTrainedTokenizerBase, records: Iterable[Record], limit: int | None) -> TokenCounts:
    """Token counts by the tokenizer's own chat template."""
    encoded = [dialogues(tokenizer, record) for record in records]
    prompts = [len(encode_prompt(tokenizer, prompt_of(record))) for record in records]
    everything = [dialogue for record in encoded for dialogue in record]
    learned = sum(int(dialogue.loss_mask.sum()) for dialogue in everything)
    above = None if limit is None else sum(max(map(len, record)) > limit for record in encoded)
    total = sum(map(len, everything))
    return TokenCounts(lengths([len(d) for d in everything]), lengths(prompts), learned / total, above)


def dialogues(tokenizer: PreTrainedTokenizerBase, record: Record) -> list[Dialogue]:
    """Each answer with its prompt before it, the chosen or best-placed one first as the record has them."""
    prompt = prompt_of(record)
    return [encode_dialogue(tokenizer, prompt + answer) for answer in answers_of(record) or ((),)]
