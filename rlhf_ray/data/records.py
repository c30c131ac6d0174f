"""The records of data files: prompts, demonstrations, and people's feedback on answers.

Invariants: records are immutable, and their turns were checked by `messages_of`; a prompt's id depends only on its turns unless
the file names one, so it is the same in every run and process.
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
    """Two continuations of one dialogue, and which of them an annotator chose."""

    prompt: Messages
    """The shared dialogue; the last turn is not the assistant's."""
    chosen: Messages
    """The chosen continuation: usually one turn; the last is the assistant's."""
    rejected: Messages
    metadata: dict[str, Any] = field(default_factory=dict)
    annotator: str | None = None
    group: str | None = None
    preference: float = 1.0
    """Probability that `chosen` is better: 1 is a clear choice, ½ a tie, any other value a soft label."""
    margin: float | None = None
    """How much better it is, on the annotator's scale; None: not given."""
    weight: float = 1.0
    """Weight of the label, relative to others."""


@dataclass(frozen=True)
class Ranking:
    """Several answers to one dialogue, ordered by an annotator."""

    prompt: Messages
    responses: tuple[Messages, ...]
    """At least two; each ends with the assistant's turn."""
    ranks: tuple[int, ...]
    """One rank for each response: 1 is the best, equal ranks are ties."""
    metadata: dict[str, Any] = field(default_factory=dict)
    annotator: str | None = None
    group: str | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Scored:
    """One answer and an annotator's ratings of it."""

    prompt: Messages
    response: Messages
    """Ends with the assistant's turn."""
    scores: dict[str, float]
    """Ratings by aspect; a single rating has the aspect `overall`."""
    metadata: dict[str, Any] = field(default_factory=dict)
    annotator: str | None = None
    group: str | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Edit:
    """An answer and an annotator's correction of it."""

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


Record = Demonstration | Pair | Ranking | Scored | Edit | PromptRecord


def prompt_of(record: Record) -> Messages:
    """The dialogue that a record answers."""
    if isinstance(record, Demonstration):
        return record.messages[:-1]
    return record.messages if isinstance(record, PromptRecord) else record.prompt


def answers_of(record: Record) -> tuple[Messages, ...]:
    """A record's answers to its prompt. A `PromptRecord` has none."""
    if isinstance(record, Demonstration):
        return (record.messages[-1:],)
    if isinstance(record, Pair):
        return record.chosen, record.rejected
    if isinstance(record, Ranking):
        return record.responses
    if isinstance(record, Edit):
        return record.original, record.edited
    return (record.response,) if isinstance(record, Scored) else ()


def messages_of(value: Any, what: str, *, ends_with: str | None = None) -> Messages:
    """Check a list of turns. `what` names it in errors; `ends_with` is the role that the last turn must have.

    Raises ValueError naming the invalid turn.
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
