"""The row formats: from one row to one record, to the several pairs that a ranking is, or to none where it holds no such record.

Every format yields each kind of record that it contains: a pair's chosen side is a demonstration, its prompt a prompt. Marks of
several answers to one prompt do not become pairs by themselves: how much better is better is not for a reader to say.
Invariants: pure functions; a row gives valid records, or a ValueError that names the key that is wrong, whatever is in it; an
answer that nobody called good is no demonstration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, Literal

from rlhf_ray.data.fields import (
    Row,
    about,
    answer_turns,
    flag,
    label,
    number,
    parse_transcript,
    prompt_turns,
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
"""`auto` looks at the first readable row. `messages`: TRL's and OpenAI's dialogues; `completions`, `pairs`, `prompts`: TRL's, of
messages or plain text; `unpaired`: TRL's `completion` with a `label`, good or not; `hh`: transcripts of hh-rlhf;
`openai_preferences`: `input`, `preferred_output`, `non_preferred_output`; `questions`: `question` and `answer`, as in GSM8K;
`rankings`: `responses` and their `order` or `ranks`; `scores`: `response` and its `score`, or `scores` by aspect; `edits`:
`original` and `edited`."""


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
    "unpaired": {"prompt", "completion", "label"},
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
        sides = answer_turns(chosen, "chosen", prompt), answer_turns(rejected, "rejected", prompt)
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
    sides = (answer_turns(value_at(row, side), side, prompt) for side in ("preferred_output", "non_preferred_output"))
    return _labelled_pair(row, prompt, *sides)


def _labelled_pair(row: Row, prompt: Messages, chosen: Messages, rejected: Messages) -> Pair:
    preference = number(row, "preference", 0.0, 1.0)
    if row.get("tie") not in (None, "") and flag(row, "tie"):
        preference = 0.5
    if chosen == rejected:
        raise ValueError("the chosen and the rejected answer are the same")
    said = {"preference": 1.0 if preference is None else preference, "margin": number(row, "margin")}
    return Pair(prompt, chosen, rejected, **label(row), **said)


def _demonstration(row: Row, messages: Messages) -> Demonstration:
    return Demonstration(messages, **about(row))


def _dialogue(row: Row) -> Demonstration:
    said = value_at(row, "messages")
    messages = messages_of(said, "messages", ends_with="assistant")
    for index, turn in enumerate(said):
        if turn.get("weight") == 0:
            raise ValueError(
                f"messages[{index}].weight is 0, and all of the assistant's turns are learned: end the dialogue with the turn "
                "to learn, one row for each, or remove weight"
            )
    return _demonstration(row, messages)


def _completion(row: Row) -> Demonstration:
    prompt = prompt_turns(value_at(row, "prompt"))
    return _demonstration(row, prompt + answer_turns(value_at(row, "completion"), "completion", prompt))


def _unpaired(row: Row) -> Scored:
    prompt = prompt_turns(value_at(row, "prompt"))
    answer = answer_turns(value_at(row, "completion"), "completion", prompt)
    return Scored(prompt, answer, {"overall": float(flag(row, "label"))}, **label(row))


def _question(row: Row) -> Demonstration:
    answer = answer_turns(value_at(row, "answer"), "answer")
    return _demonstration(row, prompt_turns(value_at(row, "question"), "question") + answer)


def _ranking(row: Row) -> Ranking:
    responses = value_at(row, "responses")
    if not isinstance(responses, Sequence) or isinstance(responses, str) or len(responses) < 2:
        raise ValueError(f"responses must be a list of at least two answers, not {str(responses)[:60]!r}")
    prompt = prompt_turns(value_at(row, "prompt"))
    turns = tuple(answer_turns(response, f"responses[{index}]", prompt) for index, response in enumerate(responses))
    return Ranking(prompt, turns, _ranks(row, len(turns)), **label(row))


def _ranked_pairs(row: Row) -> tuple[Pair, ...]:
    """Every two responses, better first. One order stays one label: its pairs share its weight, as in InstructGPT's mean."""
    ranking = _ranking(row)
    placed = zip(ranking.ranks, ranking.responses, strict=True)
    pairs = [sorted(two, key=lambda said: said[0]) for two in combinations(placed, 2)]
    said = label(row) | {"weight": ranking.weight / len(pairs)}
    return tuple(
        Pair(ranking.prompt, better, worse, **said, preference=0.5 if rank == other else 1.0)
        for (rank, better), (other, worse) in pairs
    )


def _ranks(row: Row, count: int) -> tuple[int, ...]:
    """From `ranks` (a place for each response), or `order`: responses' indices from the best, tied ones in a list."""
    if "ranks" in row:
        ranks = value_at(row, "ranks")
        places = ranks if isinstance(ranks, list | tuple) else ()
        if len(places) != count or not all(type(place) is int and place > 0 for place in places):
            raise ValueError(f"ranks must be a place from 1 for each of the {count} responses, not {str(ranks)[:60]}")
        return tuple(places)
    order = value_at(row, "order")
    places = (
        [place if isinstance(place, list | tuple) else [place] for place in order] if isinstance(order, list) else []
    )
    named = [index for place in places for index in place]
    if not all(type(index) is int for index in named) or sorted(named) != list(range(count)):
        raise ValueError(f"order must name each of the responses 0 to {count - 1} once, not {str(order)[:60]}")
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
    return Scored(prompt, answer_turns(value_at(row, "response"), "response", prompt), scores, **label(row))


def _edit(row: Row) -> Edit:
    prompt = prompt_turns(value_at(row, "prompt"))
    original, edited = (answer_turns(value_at(row, key), key, prompt) for key in ("original", "edited"))
    if original == edited:
        raise ValueError("original and edited are the same answer")
    return Edit(prompt, original, edited, **label(row))


def _edited_pair(row: Row) -> Pair:
    edit = _edit(row)
    return _labelled_pair(row, edit.prompt, edit.edited, edit.original)


def _prompt(row: Row, turns: Messages, **metadata: Any) -> PromptRecord:
    said = about(row)["metadata"]
    named = row.get("id")
    return PromptRecord(dialogue_key(turns).hex() if named in (None, "") else str(named), turns, said | metadata)


def _bare_prompt(row: Row) -> PromptRecord:
    # As in TRL, whatever else a row has is there for reward functions.
    extra = {key: value for key, value in row.items() if key not in _OF_PROMPTS}
    return _prompt(row, prompt_turns(value_at(row, "prompt")), **extra)


_OF_PROMPTS = {"id", "prompt", "metadata", "annotator", "group"}


def _question_prompt(row: Row) -> PromptRecord:
    # The reference answer goes along for a reward function to compare with.
    return _prompt(row, prompt_turns(value_at(row, "question"), "question"), answer=value_at(row, "answer"))


def _chosen(pair: Callable[[Row], Pair]) -> Callable[[Row], Demonstration | tuple[()]]:
    def read(row: Row) -> Demonstration | tuple[()]:
        record = pair(row)
        return _demonstration(row, record.prompt + record.chosen) if record.preference > 0.5 else ()

    return read


def _desirable(row: Row) -> Demonstration | tuple[()]:
    record = _unpaired(row)
    return _demonstration(row, record.prompt + record.response) if record.scores["overall"] else ()


def _prompt_of(record: Callable[[Row], Pair | Ranking | Scored | Edit]) -> Callable[[Row], PromptRecord]:
    return lambda row: _prompt(row, record(row).prompt)


PARSERS: dict[str, dict[Format, Callable[[Row], Any]]] = {
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
"""From a row to a record, or a tuple of them: by the kind that is wanted, then by format. Each raises ValueError naming the
wrong key."""
