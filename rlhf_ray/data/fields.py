"""The parts that all row formats share: turns from text or messages, label fields and metadata.

Invariants: plain text is the content of one turn, the user's in a prompt and the assistant's in an answer; a label's numbers
are finite and in their range; every problem is a ValueError that names the key.
"""

from __future__ import annotations

import math
import re
from typing import Any

from rlhf_ray.data.records import Message, Messages, messages_of

Cells = dict[str, Any]
"""The values of one row, by key."""


def value_at(row: Cells, *path: str) -> Any:
    """`row[path[0]][path[1]]…`. Raises ValueError naming the missing key."""
    value: Any = row
    for depth, key in enumerate(path):
        if not isinstance(value, dict) or key not in value:
            where = ".".join(path[:depth]) or "the row"
            seen = sorted(value) if isinstance(value, dict) else type(value).__name__
            raise ValueError(f"no key {key!r}; {where} has {seen}")
        value = value[key]
    return value


def prompt_turns(value: Any, what: str = "prompt") -> Messages:
    """The dialogue to answer, from a list of messages or the user's text."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    turns = messages_of(value, what)
    if turns[-1]["role"] == "assistant":
        raise ValueError(f"{what} must end with a turn to answer, not with the assistant's turn")
    return turns


def answer_turns(value: Any, what: str, prompt: Messages = ()) -> Messages:
    """The turns after a prompt, from a list of messages, one message, or the assistant's text.

    Some data sets repeat the prompt before every answer (UltraFeedback as TRL publishes it); it is removed.
    """
    if isinstance(value, str):
        value = [{"role": "assistant", "content": value}]
    if isinstance(value, dict):
        value = [value]
    turns = messages_of(value, what, ends_with="assistant")
    turns = turns[len(prompt) :] if turns[: len(prompt)] == prompt else turns
    if turns[0]["role"] != "assistant":
        raise ValueError(f"{what} must begin with the assistant's turn, or with the whole prompt followed by it")
    return turns


def row_info(row: Cells) -> dict[str, Any]:
    """Metadata, annotator and group of a row, as arguments of its record."""
    metadata = {} if row.get("metadata") is None else row["metadata"]
    if not isinstance(metadata, dict):
        raise ValueError(f"metadata must be an object, not {type(metadata).__name__}")
    return {"metadata": metadata, "annotator": _name(row, "annotator"), "group": _name(row, "group")}


def label_info(row: Cells) -> dict[str, Any]:
    """`row_info`, and the weight of the label."""
    weight = number(row, "weight", at_least=0.0)
    return {**row_info(row), "weight": 1.0 if weight is None else weight}


def number(row: Cells, key: str, at_least: float = -math.inf, at_most: float = math.inf) -> float | None:
    """A finite number in its range; None if the row has none."""
    value = row.get(key)
    if value is None or value == "":
        return None
    try:
        result = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{key} must be a number, not {str(value)[:60]!r}") from None
    if not math.isfinite(result) or not at_least <= result <= at_most:
        raise ValueError(f"{key} must be a finite number from {at_least:g} to {at_most:g}, not {value!r}")
    return result


def flag(row: Cells, key: str) -> bool:
    """True or false, also from 1 and 0 or text. Raises ValueError for anything else."""
    value = value_at(row, key)
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    if (result := known.get(str(value).lower())) is None:
        raise ValueError(f"{key} must be true or false, not {str(value)[:60]!r}")
    return result


def _name(row: Cells, key: str) -> str | None:
    value = row.get(key)
    if isinstance(value, dict | list):
        raise ValueError(f"{key} must be a name, not {str(value)[:60]!r}")
    return None if value is None or value == "" else str(value)


_MARKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def parse_transcript(text: str, what: str = "transcript") -> Messages:
    """The turns of an hh-rlhf transcript. Raises ValueError (naming it as `what`) if it is not one.

    Consecutive turns of one speaker become one turn with a blank line between, because chat templates expect speakers to
    alternate.
    """
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{what} is empty")
    before, *parts = _MARKER.split(text)
    if before.strip() or not parts:
        raise ValueError(f"{what} must begin with the marker 'Human:', not {text.strip()[:30]!r}")
    turns: list[Message] = []
    for marker, content in zip(parts[::2], parts[1::2], strict=True):
        role, content = _ROLES[marker], content.strip()
        if not content:
            raise ValueError(f"{what}: turn {len(turns) + 1} ({marker}) is empty")
        if turns and turns[-1]["role"] == role:
            turns[-1] = {"role": role, "content": f"{turns[-1]['content']}\n\n{content}"}
        else:
            turns.append({"role": role, "content": content})
    if turns[0]["role"] != "user" or turns[-1]["role"] != "assistant":
        raise ValueError(f"{what} must begin with Human and end with Assistant")
    return tuple(turns)


def split_pair(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """(prompt, chosen continuation, rejected continuation) of two dialogues.

    Raises ValueError if they are equal or do not share at least the first user's turn.
    """
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same dialogue")
    shared = 0
    for one, other in zip(chosen, rejected, strict=False):
        if one != other:
            break
        shared += 1
    # Both continuations must have at least one turn and begin with the assistant's.
    shared = min(shared, len(chosen) - 1, len(rejected) - 1)
    while shared and chosen[shared - 1]["role"] == "assistant":
        shared -= 1
    if not shared:
        raise ValueError("chosen and rejected share no turn to answer")
    return chosen[:shared], chosen[shared:], rejected[shared:]
