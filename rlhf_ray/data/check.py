"""The figures of `rlhf-ray data check`: counts, lengths, duplicates, leaks, biases and token counts of a data file.

Texts are compared both exactly and normalised (case, white space, punctuation), because a copy with other punctuation leaks too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_ray.data.formats import PARSERS, Format, detect_format
from rlhf_ray.data.readers import Kind
from rlhf_ray.data.records import Messages, Pair, Record, answers_of, prompt_of
from rlhf_ray.data.rows import DataError, Malformed, Row, load_rows
from rlhf_ray.data.tokenize import Dialogue, encode_dialogue, encode_prompt
from rlhf_ray.models.loading import check_model_folder, load_tokenizer, local_folder

_KINDS: tuple[Kind, ...] = ("rankings", "pairs", "scores", "edits", "demonstrations", "prompts")
"""A format's main kind is the first of these that it has; its other kinds are derived from the same rows."""


@dataclass(frozen=True)
class Contents:
    """The rows of one source."""

    format: Format
    kinds: tuple[Kind, ...]
    """Kinds of records that the format has, the main kind first."""
    records: tuple[Record, ...]
    """Records of the main kind."""
    malformed: tuple[Malformed, ...]


@dataclass(frozen=True)
class Lengths:
    """Lengths of texts, in characters or tokens."""

    median: float
    p95: float
    longest: int


@dataclass(frozen=True)
class PairFigures:
    """Figures of choices between two answers."""

    ties: int
    soft: int
    """Number of labels between a tie and a clear choice."""
    conflicting: int
    """Number of choices that another row contradicts: the same two answers with the opposite choice."""
    longer_chosen: float | None
    """Share of pairs without a tie whose longer answer was chosen, among answers of different lengths; ½ is no bias."""


@dataclass(frozen=True)
class Leaks:
    """Number of rows whose prompt is also in the other source."""

    exact: int
    """Equal word for word."""
    normalised: int
    """Equal except for case, white space and punctuation; includes `exact`."""


@dataclass(frozen=True)
class Flaw:
    """A malformed line."""

    place: str
    reason: str


@dataclass(frozen=True)
class Check:
    """All figures of a source; `data check --json` prints them under these names."""

    format: Format
    kinds: tuple[Kind, ...]
    rows: int
    """Number of readable rows."""
    malformed: tuple[Flaw, ...]
    prompts: Lengths
    """In characters."""
    answers: Lengths | None
    """In characters."""
    repeated_prompts: int
    """Number of rows whose prompt is in an earlier row."""
    repeated_rows: int
    """Number of rows with the same prompt, answers and label as an earlier row."""
    leaks: Leaks | None
    """None: no other source was given."""
    annotators: dict[str, int]
    groups: dict[str, int]
    pairs: PairFigures | None


def read_all(location: str, format: Format = "auto", split: str = "train", subset: str | None = None) -> Contents:
    """All rows of a source as records of its main kind, and the malformed rows.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: no row can be read.
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
    """The figures of a source, and the prompts that it shares with another one."""
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


def lengths(sizes: Sequence[int]) -> Lengths:
    """Median, 95th percentile and maximum."""
    return Lengths(float(np.median(sizes)), float(np.percentile(sizes, 95)), max(sizes))


def _kinds(format: Format) -> tuple[Kind, ...]:
    return tuple(kind for kind in _KINDS if format in PARSERS[kind])


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
    """The prompt, answers and label of a row, without its annotator and id."""
    label = (getattr(record, name, None) for name in ("preference", "ranks"))
    ratings = tuple(sorted(getattr(record, "scores", {}).items()))
    return _key(prompt_of(record)), tuple(map(_key, answers_of(record))), *label, ratings


def _normalised(messages: Messages) -> str:
    return " ".join(re.findall(r"\w+", _text(messages).casefold()))


@dataclass(frozen=True)
class TokenCounts:
    """Token counts of prompts and of whole dialogues (a prompt with one answer, if the record has answers)."""

    dialogues: Lengths
    prompts: Lengths
    learned: float
    """Share of the dialogues' tokens that fine-tuning would learn: those of the assistant's turns."""
    too_long: int | None
    """Number of records with a dialogue longer than the limit; None without a limit."""


def load_for_counting(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub name. Raises NotAModel."""
    folder = local_folder(model)
    check_model_folder(folder, "--model")
    return load_tokenizer(folder)


def count_tokens(tokenizer: PreTrainedTokenizerBase, records: Iterable[Record], limit: int | None) -> TokenCounts:
    """Token counts by the tokenizer's chat template."""
    encoded = [dialogues(tokenizer, record) for record in records]
    prompts = [len(encode_prompt(tokenizer, prompt_of(record))) for record in records]
    everything = [dialogue for record in encoded for dialogue in record]
    learned = sum(int(dialogue.loss_mask.sum()) for dialogue in everything)
    above = None if limit is None else sum(max(map(len, record)) > limit for record in encoded)
    total = sum(map(len, everything))
    return TokenCounts(lengths([len(d) for d in everything]), lengths(prompts), learned / total, above)


def dialogues(tokenizer: PreTrainedTokenizerBase, record: Record) -> list[Dialogue]:
    """Each answer of a record after its prompt, in the record's order; the prompt alone if there is no answer."""
    prompt = prompt_of(record)
    return [encode_dialogue(tokenizer, prompt + answer) for answer in answers_of(record) or ((),)]
