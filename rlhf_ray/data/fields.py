"""What every row format has in common: turns, from text or messages, and what a row says of itself.

Invariants: plain text is the content of one turn, the user's in a prompt and the assistant's in an answer; a label's numbers
are finite and in their range; whatever is wrong is a ValueError that names the key.
"""

from __future__ import annotations

import math
import re
from typing import Any

from rlhf_ray.data.records import Message, Messages, messages_of

Row = dict[str, Any]


def value_at(row: Row, *path: str) -> Any:
    """`row[path[0]][path[1]]…`. Raises ValueError naming what is missing."""
    value: Any = row
    for depth, key in enumerate(path):
        if not isinstance(value, dict) or key not in value:
            where = ".".join(path[:depth]) or "the row"
            seen = sorted(value) if isinstance(value, dict) else type(value).__name__
            raise ValueError(f"no key {key!r}; {where} has {seen}")
        value = value[key]
    return value


def prompt_turns(value: Any, what: str = "prompt") -> Messages:
    """A dialogue to answer, from a list of messages or the user's text."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    turns = messages_of(value, what)
    if turns[-1]["role"] == "assistant":
        raise ValueError(f"{what} must end with a turn to answer, not with the assistant's")
    return turns


def answer_turns(value: Any, what: str, prompt: Messages = ()) -> Messages:
    """What follows a prompt, from a list of messages, one message, or the assistant's text.

    Some data sets repeat the prompt before every answer (UltraFeedback as TRL publishes it): it is not said twice.
    """
    if isinstance(value, str):
        value = [{"role": "assistant", "content": value}]
    if isinstance(value, dict):
        value = [value]
    turns = messages_of(value, what, ends_with="assistant")
    turns = turns[len(prompt) :] if turns[: len(prompt)] == prompt else turns
    if turns[0]["role"] != "assistant":
        raise ValueError(f"{what} must begin with the assistant's turn, or with the whole prompt and then that")
    return turns


def about(row: Row) -> dict[str, Any]:
    """Metadata, annotator and group; absent ones are left to the record's defaults."""
    metadata = {} if row.get("metadata") is None else row["metadata"]
    if not isinstance(metadata, dict):
        raise ValueError(f"metadata must be an object, not {type(metadata).__name__}")
    return {"metadata": metadata, "annotator": _name(row, "annotator"), "group": _name(row, "group")}


def label(row: Row) -> dict[str, Any]:
    """`about`, and the label's weight."""
    weight = number(row, "weight", at_least=0.0)
    return {**about(row), "weight": 1.0 if weight is None else weight}


def number(row: Row, key: str, at_least: float = -math.inf, at_most: float = math.inf) -> float | None:
    """A finite number in its range; None where the row has none."""
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


def flag(row: Row, key: str) -> bool:
    """Yes or no, also as 1 and 0 or as a CSV file has it. Raises ValueError where the row does not say."""
    value = value_at(row, key)
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    if (said := known.get(str(value).lower())) is None:
        raise ValueError(f"{key} must be true or false, not {str(value)[:60]!r}")
    return said


def _name(row: Row, key: str) -> str | None:
    value = row.get(key)
    if isinstance(value, dict | list):
        raise ValueError(f"{key} must be a name, not {str(value)[:60]!r}")
    return None if value is None or value == "" else str(value)


_MARKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def parse_transcript(text: str, what: str = "transcript") -> Messages:
    """Turns of one transcript. Raises ValueError (naming it as `what`) where it has no turns, an empty one, or a wrong
    end.

    Neighbouring turns of one speaker are one turn with a blank line between, since chat templates expect speakers to
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

    Raises ValueError where they are equal, or where they do not share at least the first user's turn.
    """
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same dialogue")
    shared = 0
    for one, other in zip(chosen, rejected, strict=False):
        if one != other:
            break
        shared += 1
    # Both sides must go on with the assistant and have something left to say.
    shared = min(shared, len(chosen) - 1, len(rejected) - 1)
    while shared and chosen[shared - 1]["role"] == "assistant":
        shared -= 1
    if not shared:
        raise ValueError("chosen and rejected share no turn to answer")
    return chosen[:shared], chosen[shared:], rejected[shared:]
