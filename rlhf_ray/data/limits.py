"""What happens to a dialogue that has more tokens than a limit.

Invariants: an answer or a turn is never cut: truncation removes as few of the oldest turns as necessary, keeps the system's
turn, and begins with a user's; feedback is left out rather than truncated, because people gave it for the whole dialogue;
everything that is left out is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Generic, Literal, TypeVar

from rlhf_ray.data.records import Demonstration, Messages, PromptRecord, Record

TooLong = Literal["drop", "truncate", "fail"]
R = TypeVar("R", bound=Record)
E = TypeVar("E")


@dataclass(frozen=True)
class LengthLimit:
    """The most tokens that an item may have, and what to do with longer ones."""

    tokens: int
    too_long: TooLong = "drop"
    key: str = "the limit"
    """The config key of the limit, for messages."""


@dataclass(frozen=True)
class Encoded(Generic[E]):
    """The items within a limit, and how many were too long."""

    items: tuple[E, ...]
    too_long: int
    """Items that were left out."""
    shortened: int = 0
    """Number of `items` that lost old turns."""


def fit(records: Iterable[R], encode: Callable[[R], E], length: Callable[[E], int], limit: LengthLimit) -> Encoded[E]:
    """Encode each record. With `truncate`, a record that is too long is encoded without its oldest turns."""
    items: list[E] = []
    too_long = shortened = 0
    for record in records:
        item = encode(record)
        if length(item) > limit.tokens:
            shorter = map(encode, with_fewer_turns(record)) if limit.too_long == "truncate" else iter(())
            fitting = next((candidate for candidate in shorter if length(candidate) <= limit.tokens), None)
            if fitting is None:
                too_long += 1
                continue
            shortened += 1
            item = fitting
        items.append(item)
    return Encoded(tuple(items), too_long, shortened)


def with_fewer_turns(record: R) -> Iterator[R]:
    """The record without its oldest turns, one exchange fewer each time, down to the last turn before the answer.

    Yields nothing for feedback: a preference given for the whole dialogue does not hold for its end alone.
    """
    if isinstance(record, Demonstration):
        last = max((i for i, turn in enumerate(record.messages) if turn["role"] == "user"), default=0)
        for before in _shorter(record.messages[: last + 1]):
            yield replace(record, messages=before + record.messages[last + 1 :])
    elif isinstance(record, PromptRecord):
        yield from (replace(record, messages=messages) for messages in _shorter(record.messages))


def _shorter(turns: Messages) -> Iterator[Messages]:
    system = turns[:1] if turns[0]["role"] == "system" else ()
    for start in range(len(system) + 1, len(turns)):
        if turns[start]["role"] == "user":
            yield system + turns[start:]
