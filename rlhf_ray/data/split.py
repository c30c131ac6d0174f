"""Splits records into training and held-out by a hash of the prompt.

Invariant: where a prompt falls depends on its turns and the salt only, never on order, size or process; so the same
prompt cannot fall on both sides, neither within a file nor across files and runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TypeVar

from rlhf_ray.data.records import Messages, dialogue_key

T = TypeVar("T")


def is_held_out(prompt: Messages, fraction: float, salt: str = "") -> bool:
    """Whether a prompt belongs to the held-out `fraction` (0 to 1)."""
    digest = hashlib.blake2b(salt.encode() + b"\0" + dialogue_key(prompt), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def split_held_out(
    records: Sequence[T], prompt_of: Callable[[T], Messages], fraction: float, salt: str = ""
) -> tuple[list[T], list[T]]:
    """(training, held-out) records, both in their order. Raises ValueError for a fraction outside [0, 1]."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"held-out fraction {fraction}: must be between 0 and 1")
    sides: tuple[list[T], list[T]] = ([], [])
    for record in records:
        sides[is_held_out(prompt_of(record), fraction, salt)].append(record)
    return sides
