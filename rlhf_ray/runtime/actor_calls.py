"""Asking several actors at once, with a time limit, and saying what went wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from ray.actor import ActorHandle


def describe(error: BaseException) -> str:
    """One line: what went wrong in an actor, without Ray's trace of how the news came."""
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {str(cause).strip().splitlines()[0] if str(cause).strip() else 'no message'}"


async def call_all(
    actors: Mapping[str, ActorHandle], method: Callable[[ActorHandle], Awaitable[Any]], timeout_s: float
) -> dict[str, Any | Exception]:
    """Call every actor at once; by name, its answer or what went wrong (`TimeoutError` where it stayed silent)."""
    answers = await asyncio.gather(
        *(asyncio.wait_for(method(actor), timeout_s) for actor in actors.values()), return_exceptions=True
    )
    return dict(zip(actors, answers, strict=True))
