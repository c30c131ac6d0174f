"""The row formats: from one row to one record.

Every format yields each kind of record that it contains: a pair's chosen side is a demonstration, its prompt a prompt. Marks of
several answers to one prompt do not become pairs by themselves: how much better is better is not for a reader to say.
Invariants: pure functions; a row gives one valid record, or a ValueError that names the key that is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from rlhf_ray.data.fields import Row, about, answer_turns, label, number, prompt_turns, value_at
from rlhf_ray.data.records import (
    Demonstration,
    Edit,
    Messages,
    Pair,
    PromptRecord,
    Ranking,
    Scored,
    dialogue_key,
    messages_of,
)
from rlhf_ray.data.transcripts import parse_transcript, split_pair

Format = Literal[
    "auto",
    "messages",
    "completions",
    "pairs",
    "prompts",
    "hh",
    "openai_preferences",
    "questions",
    "rankings",
    "scores",
    "edits",
]
"""`auto` looks at the first readable row. `messages`: TRL's and OpenAI's dialogues; `completions`, `pairs`, `prompts`: TRL's, of
messages or plain text; `hh`: transcripts of hh-rlhf; `openai_preferences`: `input`, `preferred_output`, `non_preferred_output`;
`questions`: `question` and `answer`, as in GSM8K; `rankings`, `scores`, `edits`: README of this folder."""


def detect_format(row: Row) -> Format:
    """The format of a row by its keys. Raises ValueError listing what was seen and what is known."""
    if isinstance(row.get("chosen"), str) and "\n\nHuman:" in "\n\n" + row["chosen"] and "prompt" not in row:
        return "hh"
    for name, keys in _KEYS.items():
        if keys <= row.keys():
            return name
    known = " | ".join(", ".join(sorted(keys)) for keys in _KEYS.values())
    raise ValueError(f"unknown format: keys {sorted(row)}; known are {known}")


_KEYS: dict[Format, set[str]] = {
    "openai_preferences": {"input", "preferred_output", "non_preferred_output"},
    "pairs": {"chosen", "rejected"},
    "rankings": {"prompt", "responses"},
    "edits": {"prompt", "original", "edited"},
    "scores": {"prompt", "response"},
    "completions": {"prompt", "completion"},
    "messages": {"messages"},
    "questions": {"question", "answer"},
    "prompts": {"prompt"},
}
"""The first whose keys a row has: those that say more come first."""


def _pair(row: Row) -> Pair:
    chosen, rejected = value_at(row, "chosen"), value_at(row, "rejected")
    if row.get("prompt"):
        prompt = prompt_turns(value_at(row, "prompt"))
        sides = answer_turns(chosen, "chosen"), answer_turns(rejected, "rejected")
    else:
        # TRL's implicit prompt: both sides are whole dialogues, and what they share is the prompt.
        whole = (
            messages_of(side, what, ends_with="assistant")
            for side, what in ((chosen, "chosen"), (rejected, "rejected"))
        )
        prompt, *sides = split_pair(*whole)
    return _labelled_pair(row, prompt, *sides)


def _hh_pair(row: Row) -> Pair:
    sides = (parse_transcript(value_at(row, side), side) for side in ("chosen", "rejected"))
    return _labelled_pair(row, *split_pair(*sides))


def _openai_pair(row: Row) -> Pair:
    prompt = prompt_turns(value_at(row, "input", "messages"), "input.messages")
    sides = (answer_turns(value_at(row, side), side) for side in ("preferred_output", "non_preferred_output"))
    return _labelled_pair(row, prompt, *sides)


def _labelled_pair(row: Row, prompt: Messages, chosen: Messages, rejected: Messages) -> Pair:
    preference = number(row, "preference", 0.0, 1.0)
    if row.get("tie") in (True, 1, "true", "True"):
        preference = 0.5
    said = {"preference": 1.0 if preference is None else preference, "margin": number(row, "margin")}
    return Pair(prompt, chosen, rejected, **label(row), **said)


def _demonstration(row: Row, messages: Messages) -> Demonstration:
    return Demonstration(messages, **about(row))


def _dialogue(row: Row) -> Demonstration:
    return _demonstration(row, messages_of(value_at(row, "messages"), "messages", ends_with="assistant"))


def _completion(row: Row) -> Demonstration:
    prompt = prompt_turns(value_at(row, "prompt"))
    return _demonstration(row, prompt + answer_turns(value_at(row, "completion"), "completion"))


def _question(row: Row) -> Demonstration:
    answer = answer_turns(value_at(row, "answer"), "answer")
    return _demonstration(row, prompt_turns(value_at(row, "question"), "question") + answer)


def _ranking(row: Row) -> Ranking:
    responses = value_at(row, "responses")
    if not isinstance(responses, Sequence) or isinstance(responses, str) or len(responses) < 2:
        raise ValueError(f"responses must be a list of at least two answers, not {str(responses)[:60]!r}")
    turns = tuple(answer_turns(response, f"responses[{index}]") for index, response in enumerate(responses))
    ranks = _ranks(row, len(turns))
    return Ranking(prompt_turns(value_at(row, "prompt")), turns, ranks, **label(row))


def _ranks(row: Row, count: int) -> tuple[int, ...]:
    """From `ranks` (a place for each response), or `order`: responses' indices from the best, tied ones in a list."""
    if "ranks" in row:
        ranks = value_at(row, "ranks")
        if (
            not isinstance(ranks, Sequence)
            or len(ranks) != count
            or not all(isinstance(r, int) and r > 0 for r in ranks)
        ):
            raise ValueError(f"ranks must be a place from 1 for each of the {count} responses, not {ranks}")
        return tuple(ranks)
    places = [place if isinstance(place, Sequence) else [place] for place in value_at(row, "order")]
    if sorted(index for place in places for index in place) != list(range(count)):
        raise ValueError(f"order must name each of the responses 0 to {count - 1} once, not {row['order']}")
    ranks, rank = [0] * count, 1
    for place in places:
        for index in place:
            ranks[index] = rank
        rank += len(place)
    return tuple(ranks)


def _scored(row: Row) -> Scored:
    scores: dict[str, float] = {}
    for key in ("scores", "aspects"):
        marks = row.get(key) or {}
        if not isinstance(marks, dict):
            raise ValueError(f"{key} must be an object of marks by aspect, not {type(marks).__name__}")
        scores |= {aspect: mark for aspect in marks if (mark := number(marks, aspect)) is not None}
    for key in ("score", "overall"):
        if (mark := number(row, key)) is not None:
            scores["overall"] = mark
    if not scores:
        raise ValueError(f"no mark: score, or scores by aspect; the row has {sorted(row)}")
    prompt = prompt_turns(value_at(row, "prompt"))
    return Scored(prompt, answer_turns(value_at(row, "response"), "response"), scores, **label(row))


def _edit(row: Row) -> Edit:
    prompt = prompt_turns(value_at(row, "prompt"))
    original, edited = (answer_turns(value_at(row, key), key) for key in ("original", "edited"))
    if original == edited:
        raise ValueError("original and edited are the same answer")
    return Edit(prompt, original, edited, **label(row))


def _edited_pair(row: Row) -> Pair:
    edit = _edit(row)
    return _labelled_pair(row, edit.prompt, edit.edited, edit.original)


def _prompt(row: Row, turns: Messages, **metadata: Any) -> PromptRecord:
    said = about(row)["metadata"]
    return PromptRecord(str(row.get("id") or dialogue_key(turns).hex()), turns, said | metadata)


def _bare_prompt(row: Row) -> PromptRecord:
    # As in TRL, whatever else a row has is there for reward functions.
    extra = {key: value for key, value in row.items() if key not in _OF_PROMPTS}
    return _prompt(row, prompt_turns(value_at(row, "prompt")), **extra)


_OF_PROMPTS = {"id", "prompt", "metadata", "annotator", "group"}


def _question_prompt(row: Row) -> PromptRecord:
    # The reference answer goes along for a reward function to compare with.
    return _prompt(row, prompt_turns(value_at(row, "question"), "question"), answer=value_at(row, "answer"))


def _chosen(pair: Callable[[Row], Pair]) -> Callable[[Row], Demonstration]:
    def read(row: Row) -> Demonstration:
        record = pair(row)
        return _demonstration(row, record.prompt + record.chosen)

    return read


def _prompt_of(record: Callable[[Row], Pair | Ranking | Scored | Edit]) -> Callable[[Row], PromptRecord]:
    return lambda row: _prompt(row, record(row).prompt)


PARSERS: dict[str, dict[Format, Callable[[Row], Any]]] = {
    "demonstrations": {
        "messages": _dialogue,
        "completions": _completion,
        "questions": _question,
        "pairs": _chosen(_pair),
        "hh": lambda row: _demonstration(row, parse_transcript(value_at(row, "chosen"), "chosen")),
        "openai_preferences": _chosen(_openai_pair),
        "edits": _chosen(_edited_pair),
    },
    "pairs": {"pairs": _pair, "hh": _hh_pair, "openai_preferences": _openai_pair, "edits": _edited_pair},
    "rankings": {"rankings": _ranking},
    "scores": {"scores": _scored},
    "edits": {"edits": _edit},
    "prompts": {
        "prompts": _bare_prompt,
        "completions": _bare_prompt,
        "messages": lambda row: _prompt(
            row, prompt_turns(_dialogue(row).messages[:-1], "messages without the last turn")
        ),
        "questions": _question_prompt,
        "pairs": _prompt_of(_pair),
        "hh": _prompt_of(_hh_pair),
        "openai_preferences": _prompt_of(_openai_pair),
        "rankings": _prompt_of(_ranking),
        "scores": _prompt_of(_scored),
        "edits": _prompt_of(_edit),
    },
}
"""From a row to a record: by the kind of record that is wanted, then by format. Each raises ValueError naming the wrong key."""
