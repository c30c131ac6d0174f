"""Transcripts in the format of Anthropic's hh-rlhf: one string per dialogue, turns marked `\\n\\nHuman:` and
`\\n\\nAssistant:`.

Invariants: a parsed transcript starts with the user and ends with the assistant, and no turn is empty; a pair's prompt
is what both transcripts share, up to the last user's turn before they differ, so where they part early each side keeps
all that follows.
"""

from __future__ import annotations

import re

from rlhf_ray.data.records import Message, Messages

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
