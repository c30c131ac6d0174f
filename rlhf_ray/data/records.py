"""What data files hold, once read: prompts, and what people said of answers to them.

Invariants: records are immutable and valid by construction (`messages` below); a prompt's id is a function of its turns
alone unless the file names one, so it is the same in every run and process.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, str]
"""One turn, `{"role", "content"}`."""
Messages = tuple[Message, ...]

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Demonstration:
    """A dialogue to imitate."""

    messages: Messages
    """The whole dialogue; the last turn is the assistant's."""
    metadata: dict[str, Any] = field(default_factory=dict)
    annotator: str | None = None
    """Who wrote it."""
    group: str | None = None
    """The writer's group, for example a profession."""


@dataclass(frozen=True)
class Pair:
    """Two continuations of one dialogue, and which of them somebody chose."""

    prompt: Messages
    """The shared dialogue; the last turn is not the assistant's."""
    chosen: Messages
    """What follows in the chosen one: usually one turn; the last is the assistant's."""
    rejected: Messages
    metadata: dict[str, Any] = field(default_factory=dict)
    annotator: str | None = None
    group: str | None = None
    preference: float = 1.0
    """Probability that `chosen` is the better one: 1 is a clear choice, ½ a tie, anything between a soft label."""
    margin: float | None = None
    """By how much, on the annotator's scale; None: not said."""
    weight: float = 1.0
    """How much the label counts, relative to others."""


@dataclass(frozen=True)
class Ranking:
    """Several answers to one dialogue, in somebody's order."""

    prompt: Messages
    responses: tuple[Messages, ...]
    """At least two; each ends with the assistant's turn."""
    ranks: tuple[int, ...]
    """One for each response: 1 is the best, equal numbers tie."""
    metadata: dict[str, Any] = field(default_factory=dict)
    annotator: str | None = None
    group: str | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Scored:
    """One answer and somebody's marks for it."""

    prompt: Messages
    response: Messages
    """Ends with the assistant's turn."""
    scores: dict[str, float]
    """By aspect; a single mark has the aspect `overall`."""
    metadata: dict[str, Any] = field(default_factory=dict)
    annotator: str | None = None
    group: str | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Edit:
    """An answer and somebody's correction of it."""

    prompt: Messages
    original: Messages
    edited: Messages
    """Better than `original`, and worth imitating."""
    metadata: dict[str, Any] = field(default_factory=dict)
    annotator: str | None = None
    group: str | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class PromptRecord:
    """A dialogue to answer."""

    id: str
    messages: Messages
    """The last turn is not the assistant's."""
    metadata: dict[str, Any] = field(default_factory=dict)


def messages_of(value: Any, what: str, *, ends_with: str | None = None) -> Messages:
    """Checks one list of turns. `what` names it in errors; `ends_with` is the role that the last turn must have.

    Raises ValueError naming the turn that is wrong.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ValueError(f"{what} must be a list of at least one turn, not {_shown(value)}")
    for index, turn in enumerate(value):
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            raise ValueError(f'{what}[{index}] must be {{"role": …, "content": …}}, not {_shown(turn)}')
        if turn["role"] not in ROLES:
            raise ValueError(f"{what}[{index}].role must be one of {', '.join(ROLES)}, not {_shown(turn['role'])}")
        if not isinstance(turn["content"], str) or not turn["content"].strip():
            raise ValueError(f"{what}[{index}].content must be text, not {_shown(turn['content'])}")
    if ends_with and value[-1]["role"] != ends_with:
        raise ValueError(f"{what} must end with a turn of the {ends_with}, not of the {value[-1]['role']}")
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in value)


def dialogue_key(messages: Sequence[Message]) -> bytes:
    """A hash of the turns' roles and contents: 16 bytes, the same in every process."""
    text = json.dumps([(turn["role"], turn["content"]) for turn in messages], ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
