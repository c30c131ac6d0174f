"""What happens to a dialogue that has more tokens than a limit.

Invariants: an answer is never cut, and neither is a turn: truncation leaves out the oldest turns of what comes before, as few as
it takes, keeps the system's, and begins with the user's; feedback is dropped rather than truncated, since people said it of the
whole dialogue; nothing is left out uncounted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Generic, Literal, TypeVar

from rlhf_ray.data.records import Demonstration, Edit, Messages, Pair, PromptRecord, Ranking, Scored

TooLong = Literal["drop", "truncate", "fail"]
Record = Demonstration | Pair | Ranking | Scored | Edit | PromptRecord
R = TypeVar("R", bound=Record)
E = TypeVar("E")


@dataclass(frozen=True)
class LengthLimit:
    """Most tokens, and what to do with what has more."""

    tokens: int
    too_long: TooLong = "drop"
    key: str = "the limit"
    """The config key that sets it, for messages to people."""


@dataclass(frozen=True)
class Encoded(Generic[E]):
    """What fits, and how many items did not."""

    items: tuple[E, ...]
    too_long: int
    """Left out."""
    shortened: int = 0
    """Among `items`: those that lost old turns."""


def fit(records: Iterable[R], encode: Callable[[R], E], length: Callable[[E], int], limit: LengthLimit) -> Encoded[E]:
    """Encode each record, or under `truncate` the longest part of it that fits."""
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

    Nothing for feedback: what somebody preferred in view of the whole dialogue is no preference in view of its end.
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
