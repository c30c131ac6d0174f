"""The row formats: from one JSON object to one record.

Formats: `messages` (`{"messages": […]}`), `pairs` (`{"prompt": […], "chosen": […], "rejected": […]}`), `prompts`
(`{"prompt": […]}`), all with optional `id`, `annotator`, `group` and `metadata`; `hh` (`{"chosen": str, "rejected":
str}`, see transcripts.py). Each format yields every kind of record that it contains: a pair's chosen side is a
demonstration too. Invariants: pure functions; a row gives one valid record, or a ValueError that names the key that is
wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from rlhf_ray.data.records import Demonstration, Pair, PromptRecord, dialogue_key, messages_of
from rlhf_ray.data.transcripts import parse_transcript, split_pair

Format = Literal["auto", "messages", "pairs", "prompts", "hh"]
"""`auto` looks at the first readable row."""


def detect_format(row: dict[str, Any]) -> Format:
    """The format of a row by its keys. Raises ValueError listing what was seen and what is known."""
    if "messages" in row:
        return "messages"
    if isinstance(row.get("chosen"), str) and "rejected" in row and "prompt" not in row:
        return "hh"
    if "prompt" in row:
        return "pairs" if "chosen" in row else "prompts"
    raise ValueError(
        f"unknown format: keys {sorted(row)}; known are messages | prompt, chosen, rejected | chosen, rejected"
    )


def _demonstration_of_messages(row: dict[str, Any]) -> Demonstration:
    return Demonstration(messages_of(_key(row, "messages"), "messages", ends_with="assistant"), **_about(row))


def _demonstration_of_pair(pair: Pair) -> Demonstration:
    return Demonstration(pair.prompt + pair.chosen, pair.metadata, pair.annotator, pair.group)


def _pair_of_pairs(row: dict[str, Any]) -> Pair:
    prompt = messages_of(_key(row, "prompt"), "prompt")
    if prompt[-1]["role"] == "assistant":
        raise ValueError("prompt must end with a turn to answer, not with the assistant's")
    sides = (messages_of(_key(row, side), side, ends_with="assistant") for side in ("chosen", "rejected"))
    return Pair(prompt, *sides, **_about(row))


def _pair_of_hh(row: dict[str, Any]) -> Pair:
    sides = (parse_transcript(_key(row, side), side) for side in ("chosen", "rejected"))
    return Pair(*split_pair(*sides), **_about(row))


def _prompt(row: dict[str, Any], messages: Any) -> PromptRecord:
    turns = messages_of(messages, "prompt")
    if turns[-1]["role"] == "assistant":
        raise ValueError("prompt must end with a turn to answer, not with the assistant's")
    return PromptRecord(str(row.get("id") or dialogue_key(turns).hex()), turns, _about(row)["metadata"])


PARSERS: dict[str, dict[Format, Callable[[dict[str, Any]], Any]]] = {
    "demonstrations": {
        "messages": _demonstration_of_messages,
        "pairs": lambda row: _demonstration_of_pair(_pair_of_pairs(row)),
        "hh": lambda row: Demonstration(parse_transcript(_key(row, "chosen"), "chosen"), **_about(row)),
    },
    "pairs": {"pairs": _pair_of_pairs, "hh": _pair_of_hh},
    "prompts": {
        "prompts": lambda row: _prompt(row, _key(row, "prompt")),
        "pairs": lambda row: _prompt(row, _key(row, "prompt")),
        "messages": lambda row: _prompt(row, _demonstration_of_messages(row).messages[:-1]),
        "hh": lambda row: _prompt(row, _pair_of_hh(row).prompt),
    },
}
"""From a row to a record: by the kind of record that is wanted, then by format. Each raises ValueError naming the wrong
key."""


def _key(row: dict[str, Any], key: str) -> Any:
    if key not in row:
        raise ValueError(f"no key {key!r}; the row has {sorted(row)}")
    return row[key]


def _about(row: dict[str, Any]) -> dict[str, Any]:
    metadata = row.get("metadata", {})
    if not isinstance(metadata, dict):
        raise ValueError(f"metadata must be an object, not {type(metadata).__name__}")
    return {"metadata": metadata, "annotator": row.get("annotator"), "group": row.get("group")}
