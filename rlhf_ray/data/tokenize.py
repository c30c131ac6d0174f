"""From messages to token ids, by the tokenizer's own chat template.

Invariants: a prompt's ids are a prefix of the ids of every dialogue that continues it, so what is trained on is what is
generated from; loss falls on the assistant's turns only, the token that ends the turn included; what is too long is
treated as limits.py says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_ray.data.limits import Encoded, LengthLimit, fit
from rlhf_ray.data.records import Demonstration, Message, PromptRecord
from rlhf_ray.types import Prompt


@dataclass(frozen=True, eq=False)
class Dialogue:
    """A tokenised dialogue of L tokens."""

    token_ids: np.ndarray
    """int32 [L]."""
    loss_mask: np.ndarray
    """bool [L]: tokens that the assistant would have to say."""

    def __len__(self) -> int:
        return len(self.token_ids)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> np.ndarray:
    """int32 [P]: the dialogue so far and the beginning of the assistant's turn."""
    return np.asarray(_ids(tokenizer, messages, prompt=True), dtype=np.int32)


def encode_dialogue(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> Dialogue:
    """The whole dialogue, with loss on the assistant's turns.

    A template with `{% generation %}` marks says itself where those are. For others, a turn is what the dialogue up to
    and with it has more than the prompt before it, up to the end-of-sequence token. Raises ValueError where the
    template does not extend its prompts, as some do that rewrite earlier turns.
    """
    if _marks_turns(tokenizer):
        encoded = tokenizer.apply_chat_template(
            list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return _dialogue(encoded["input_ids"], encoded["assistant_masks"])
    token_ids = _ids(tokenizer, messages)
    mask = np.zeros(len(token_ids), dtype=bool)
    for index, turn in enumerate(messages):
        if turn["role"] == "assistant":
            before = _ids(tokenizer, messages[:index], prompt=True)
            after = _ids(tokenizer, messages[: index + 1])
            if after[: len(before)] != before or token_ids[: len(after)] != after:
                raise ValueError(
                    f"the chat template of {tokenizer.name_or_path!r} rewrites what came before turn {index + 1}, "
                    f"so its tokens cannot be told apart: use a template with {{% generation %}} marks"
                )
            mask[len(before) : _turn_end(after, len(before), tokenizer.eos_token_id)] = True
    return _dialogue(token_ids, mask)


def encode_demonstrations(
    tokenizer: PreTrainedTokenizerBase, records: Iterable[Demonstration], limit: LengthLimit
) -> Encoded[Dialogue]:
    """Dialogues within the limit."""
    return fit(records, lambda record: encode_dialogue(tokenizer, record.messages), len, limit)


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, records: Iterable[PromptRecord], limit: LengthLimit
) -> Encoded[Prompt]:
    """Prompts within the limit, as the rest of the system takes them."""

    def encode(record: PromptRecord) -> Prompt:
        return Prompt(record.id, encode_prompt(tokenizer, record.messages), record.messages, record.metadata)

    return fit(records, encode, lambda prompt: len(prompt.token_ids), limit)


def _dialogue(token_ids: Sequence[int], mask: Sequence[int] | np.ndarray) -> Dialogue:
    return Dialogue(np.asarray(token_ids, dtype=np.int32), np.asarray(mask, dtype=bool))


def _marks_turns(tokenizer: PreTrainedTokenizerBase) -> bool:
    return re.search(r"\{%-?\s*generation\b", tokenizer.get_chat_template()) is not None


def _ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, prompt: bool = False) -> list[int]:
    encoded = tokenizer.apply_chat_template(
        list(messages), tokenize=True, return_dict=True, add_generation_prompt=prompt
    )
    return list(encoded["input_ids"])


def _turn_end(token_ids: Sequence[int], start: int, eos: int | None) -> int:
    """Where a turn that starts at `start` ends: behind its last end-of-sequence token, or at the end where it has
    none."""
    for index in range(len(token_ids) - 1, start - 1, -1):
        if token_ids[index] == eos:
            return index + 1
    return len(token_ids)
