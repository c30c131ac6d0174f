"""The row formats: parsers from one row to one record, to several pairs (of a ranking), or to no record.

A format gives every kind of record that it contains: the chosen side of a pair is a demonstration, and its prompt is a prompt.
Ratings of several answers to one prompt do not become pairs, because that would need a threshold that the data does not give.
Invariants: parsers are pure functions; any row gives valid records or a ValueError that names the invalid key; an answer that
is not marked as good is not a demonstration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, Literal

from rlhf_ray.data.fields import (
    Cells,
    answer_turns,
    flag,
    label_info,
    number,
    parse_transcript,
    prompt_turns,
    row_info,
    split_pair,
    value_at,
)
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

Format = Literal[
    "auto",
    "messages",
    "completions",
    "unpaired",
    "pairs",
    "prompts",
    "hh",
    "openai_preferences",
    "questions",
    "rankings",
    "scores",
    "edits",
]
"""`auto`: by the first readable row's keys. `messages`: TRL's and OpenAI's dialogues; `completions`, `pairs`, `prompts`: TRL's,
of messages or plain text; `unpaired`: TRL's `completion` with a boolean `label`; `hh`: transcripts of hh-rlhf;
`openai_preferences`: `input`, `preferred_output`, `non_preferred_output`; `questions`: `question` and `answer`, as in GSM8K;
`rankings`: `responses` and their `order` or `ranks`; `scores`: `response` and its `score`, or `scores` by aspect; `edits`:
`original` and `edited`."""


def detect_format(row: Cells) -> Format:
    """The format of a row by its keys. Raises ValueError listing the row's keys and the known ones."""
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
    "unpaired": {"prompt", "completion", "label"},
    "completions": {"prompt", "completion"},
    "messages": {"messages"},
    "questions": {"question", "answer"},
    "prompts": {"prompt"},
}
"""A row has the first format whose keys it has, so the more specific formats come first."""


def _pair(row: Cells) -> Pair:
    chosen, rejected = value_at(row, "chosen"), value_at(row, "rejected")
    if row.get("prompt"):
        prompt = prompt_turns(value_at(row, "prompt"))
        sides = [answer_turns(chosen, "chosen", prompt), answer_turns(rejected, "rejected", prompt)]
    else:
        # TRL's implicit prompt: both sides are whole dialogues, and their common beginning is the prompt.
        prompt, *sides = split_pair(
            messages_of(chosen, "chosen", ends_with="assistant"),
            messages_of(rejected, "rejected", ends_with="assistant"),
        )
    return _labelled_pair(row, prompt, *sides)


def _hh_pair(row: Cells) -> Pair:
    sides = (parse_transcript(value_at(row, side), side) for side in ("chosen", "rejected"))
    return _labelled_pair(row, *split_pair(*sides))


def _openai_pair(row: Cells) -> Pair:
    prompt = prompt_turns(value_at(row, "input", "messages"), "input.messages")
    sides = (answer_turns(value_at(row, side), side, prompt) for side in ("preferred_output", "non_preferred_output"))
    return _labelled_pair(row, prompt, *sides)


def _labelled_pair(row: Cells, prompt: Messages, chosen: Messages, rejected: Messages) -> Pair:
    preference = number(row, "preference", 0.0, 1.0)
    if row.get("tie") not in (None, "") and flag(row, "tie"):
        preference = 0.5
    if chosen == rejected:
        raise ValueError("the chosen and the rejected answer are the same")
    preference = 1.0 if preference is None else preference
    return Pair(prompt, chosen, rejected, **label_info(row), preference=preference, margin=number(row, "margin"))


def _demonstration(row: Cells, messages: Messages) -> Demonstration:
    return Demonstration(messages, **row_info(row))


def _dialogue(row: Cells) -> Demonstration:
    turns = value_at(row, "messages")
    messages = messages_of(turns, "messages", ends_with="assistant")
    for index, turn in enumerate(turns):
        if turn.get("weight") == 0:
            raise ValueError(
                f"messages[{index}].weight is 0, which is not supported: all of the assistant's turns are learned. Write one row "
                "for each turn to learn, which ends with it, or remove weight"
            )
    return _demonstration(row, messages)


def _completion(row: Cells) -> Demonstration:
    prompt = prompt_turns(value_at(row, "prompt"))
    return _demonstration(row, prompt + answer_turns(value_at(row, "completion"), "completion", prompt))


def _unpaired(row: Cells) -> Scored:
    prompt = prompt_turns(value_at(row, "prompt"))
    answer = answer_turns(value_at(row, "completion"), "completion", prompt)
    return Scored(prompt, answer, {"overall": float(flag(row, "label"))}, **label_info(row))


def _question(row: Cells) -> Demonstration:
    answer = answer_turns(value_at(row, "answer"), "answer")
    return _demonstration(row, prompt_turns(value_at(row, "question"), "question") + answer)


def _ranking(row: Cells) -> Ranking:
    responses = value_at(row, "responses")
    if not isinstance(responses, Sequence) or isinstance(responses, str) or len(responses) < 2:
        raise ValueError(f"responses must be a list of at least two answers, not {str(responses)[:60]!r}")
    prompt = prompt_turns(value_at(row, "prompt"))
    turns = tuple(answer_turns(response, f"responses[{index}]", prompt) for index, response in enumerate(responses))
    return Ranking(prompt, turns, _ranks(row, len(turns)), **label_info(row))


def _ranked_pairs(row: Cells) -> tuple[Pair, ...]:
    """All pairs of responses, the better one first. They share the ranking's weight, as in InstructGPT's mean over pairs."""
    ranking = _ranking(row)
    placed = zip(ranking.ranks, ranking.responses, strict=True)
    pairs = [sorted(two, key=lambda placed: placed[0]) for two in combinations(placed, 2)]
    info = label_info(row) | {"weight": ranking.weight / len(pairs)}
    return tuple(
        Pair(ranking.prompt, better, worse, **info, preference=0.5 if rank == other else 1.0)
        for (rank, better), (other, worse) in pairs
    )


def _ranks(row: Cells, count: int) -> tuple[int, ...]:
    """Ranks from `ranks` (one for each response) or `order` (indices of responses, best first, ties in a list)."""
    if "ranks" in row:
        ranks = value_at(row, "ranks")
        places = ranks if isinstance(ranks, list | tuple) else ()
        if len(places) != count or not all(type(place) is int and place > 0 for place in places):
            raise ValueError(f"ranks must have a rank from 1 for each of the {count} responses, not {str(ranks)[:60]}")
        return tuple(places)
    order = value_at(row, "order")
    places = (
        [place if isinstance(place, list | tuple) else [place] for place in order] if isinstance(order, list) else []
    )
    named = [index for place in places for index in place]
    if not all(type(index) is int for index in named) or sorted(named) != list(range(count)):
        raise ValueError(f"order must list each response 0 to {count - 1} exactly once, not {str(order)[:60]}")
    ranks, rank = [0] * count, 1
    for place in places:
        for index in place:
            ranks[index] = rank
        rank += len(place)
    return tuple(ranks)


def _scored(row: Cells) -> Scored:
    scores: dict[str, float] = {}
    for key in ("scores", "aspects"):
        ratings = row.get(key) or {}
        if not isinstance(ratings, dict):
            raise ValueError(f"{key} must be an object of ratings by aspect, not {type(ratings).__name__}")
        scores |= {aspect: rating for aspect in ratings if (rating := number(ratings, aspect)) is not None}
    for key in ("score", "overall"):
        if (rating := number(row, key)) is not None:
            scores["overall"] = rating
    if not scores:
        raise ValueError(f"no rating: expected score, or scores by aspect; the row has {sorted(row)}")
    prompt = prompt_turns(value_at(row, "prompt"))
    return Scored(prompt, answer_turns(value_at(row, "response"), "response", prompt), scores, **label_info(row))


def _edit(row: Cells) -> Edit:
    prompt = prompt_turns(value_at(row, "prompt"))
    original, edited = (answer_turns(value_at(row, key), key, prompt) for key in ("original", "edited"))
    if original == edited:
        raise ValueError("original and edited are the same answer")
    return Edit(prompt, original, edited, **label_info(row))


def _edited_pair(row: Cells) -> Pair:
    edit = _edit(row)
    return _labelled_pair(row, edit.prompt, edit.edited, edit.original)


def _prompt(row: Cells, turns: Messages, **metadata: Any) -> PromptRecord:
    row_metadata = row_info(row)["metadata"]
    id_ = row.get("id")
    return PromptRecord(dialogue_key(turns).hex() if id_ in (None, "") else str(id_), turns, row_metadata | metadata)


def _bare_prompt(row: Cells) -> PromptRecord:
    # As in TRL, all other keys of a row are metadata for reward functions.
    extra = {key: value for key, value in row.items() if key not in _PROMPT_KEYS}
    return _prompt(row, prompt_turns(value_at(row, "prompt")), **extra)


_PROMPT_KEYS = {"id", "prompt", "metadata", "annotator", "group"}


def _question_prompt(row: Cells) -> PromptRecord:
    # A reward function may compare a response with the reference answer.
    return _prompt(row, prompt_turns(value_at(row, "question"), "question"), answer=value_at(row, "answer"))


def _chosen(pair: Callable[[Cells], Pair]) -> Callable[[Cells], Demonstration | tuple[()]]:
    def read(row: Cells) -> Demonstration | tuple[()]:
        record = pair(row)
        return _demonstration(row, record.prompt + record.chosen) if record.preference > 0.5 else ()

    return read


def _desirable(row: Cells) -> Demonstration | tuple[()]:
    record = _unpaired(row)
    return _demonstration(row, record.prompt + record.response) if record.scores["overall"] else ()


def _prompt_of(record: Callable[[Cells], Pair | Ranking | Scored | Edit]) -> Callable[[Cells], PromptRecord]:
    return lambda row: _prompt(row, record(row).prompt)


PARSERS: dict[str, dict[Format, Callable[[Cells], Any]]] = {
    "demonstrations": {
        "messages": _dialogue,
        "completions": _completion,
        "questions": _question,
        "pairs": _chosen(_pair),
        "unpaired": _desirable,
        "hh": lambda row: _demonstration(row, parse_transcript(value_at(row, "chosen"), "chosen")),
        "openai_preferences": _chosen(_openai_pair),
        "edits": _chosen(_edited_pair),
    },
    "pairs": {
        "pairs": _pair,
        "hh": _hh_pair,
        "openai_preferences": _openai_pair,
        "edits": _edited_pair,
        "rankings": _ranked_pairs,
    },
    "rankings": {"rankings": _ranking},
    "scores": {"scores": _scored, "unpaired": _unpaired},
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
        "unpaired": _prompt_of(_unpaired),
        "edits": _prompt_of(_edit),
    },
}
"""Parsers from a row to a record or a tuple of records, by kind of record and format. They raise ValueError naming the invalid
key."""
