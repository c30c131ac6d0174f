"""From messages to token ids, by the tokenizer's own chat template.

Invariants: a prompt's ids are a prefix of the ids of every dialogue that continues it, so what is trained on is what is
generated from; loss falls on the assistant's turns only, the token that ends the turn included; what is too long is
treated as limits.py says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise

import numpy as np
from jinja2 import TemplateError as JinjaError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from rlhf_ray.data.limits import Encoded, LengthLimit, fit
from rlhf_ray.data.records import Demonstration, Message, PromptRecord
from rlhf_ray.errors import InputError
from rlhf_ray.types import Prompt


class TemplateError(InputError, ValueError):
    """A tokenizer's chat template cannot be used for these dialogues."""


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
    """int32 [P]: the dialogue so far and the beginning of the assistant's turn. Raises `TemplateError`."""
    text = rendered(tokenizer, messages, prompt=True)
    turns = _turns(tokenizer, messages, text) or []
    return np.asarray(_token_ids(tokenizer, text, [cut for turn in turns for cut in turn])[0], dtype=np.int32)


def encode_dialogue(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> Dialogue:
    """The whole dialogue, with loss on the assistant's turns.

    A template with `{% generation %}` marks says itself where those are. For others, a turn is what the dialogue up to
    and with it has more than the prompt before it, up to the end-of-sequence token.

    Raises:
        TemplateError: the template refuses the dialogue, or does not extend its prompts, as some do that rewrite earlier turns.
    """
    text = rendered(tokenizer, messages)
    turns = _turns(tokenizer, messages, text)
    if turns is None:
        raise TemplateError(
            f"the chat template of {tokenizer.name_or_path!r} writes earlier turns in another way once a dialogue goes on, so "
            "the assistant's cannot be told apart: use a template with {% generation %} marks"
        )
    token_ids, counts = _token_ids(tokenizer, text, [cut for turn in turns for cut in turn])
    mask = np.zeros(len(token_ids), dtype=bool)
    for begin, end in zip(counts[::2], counts[1::2], strict=True):
        mask[begin:end] = True
    return Dialogue(np.asarray(token_ids, dtype=np.int32), mask)


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


def rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, prompt: bool = False) -> str:
    """What the template makes of the messages: a dialogue, or with `prompt` up to where the assistant begins to speak.

    Raises `TemplateError` where it refuses them.
    """
    return _render(tokenizer, messages, prompt=prompt)[0]


def _turns(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], text: str) -> list[tuple[int, int]] | None:
    """Where in `text` the assistant speaks, [begin, end) in characters; None where it cannot be told.

    `text` is the dialogue, or the prompt that goes on from it.
    """
    if _marks_turns(tokenizer):
        return _render(tokenizer, messages, marks=True)[1]
    turns = []
    for index, turn in enumerate(messages):
        if turn["role"] == "assistant":
            before = rendered(tokenizer, messages[:index], prompt=True)
            after = rendered(tokenizer, messages[: index + 1])
            if not after.startswith(before) or not text.startswith(after):
                return None
            end = after.rfind(tokenizer.eos_token, len(before))
            turns.append((len(before), len(after) if end < 0 else end + len(tokenizer.eos_token)))
    return turns


def _token_ids(tokenizer: PreTrainedTokenizerBase, text: str, cuts: Sequence[int]) -> tuple[list[int], list[int]]:
    """Token ids of the text, and how many of them are before each cut.

    What is before a cut is tokenised as if nothing followed, as it is when the model goes on from there. Mostly that changes
    nothing; where a token would lie across the cut (a line break before it and one behind it), a new one begins at the cut.
    """
    bounds = [0, *cuts, len(text)]
    whole, *pieces = _plain_ids(tokenizer, [text, *(text[a:b] for a, b in pairwise(bounds))])
    counts = list(accumulate(map(len, pieces)))
    if list(chain.from_iterable(pieces)) == whole:
        return whole, counts[:-1]
    # Across a cut, or the tokenizer puts a space before every text, as SentencePiece's do: cut by cut, only where needed.
    ids, counts, done, begin = [], [], [], 0
    for previous, cut in pairwise(bounds):
        [longer] = _plain_ids(tokenizer, [text[begin:cut]])
        if longer[: len(ids)] != ids:
            done, begin = done + ids, previous
            [longer] = _plain_ids(tokenizer, [text[begin:cut]])
        ids = longer
        counts.append(len(done) + len(ids))
    return done + ids, counts[:-1]


def _plain_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def _marks_turns(tokenizer: PreTrainedTokenizerBase) -> bool:
    return re.search(r"\{%-?\s*generation\b", _template(tokenizer)) is not None


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:  # none, or several by name and none of them the default
        raise TemplateError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no default chat template: {error}"
        ) from error


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, prompt: bool = False, marks: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    """The text, and with `marks` the characters between the template's marks."""
    try:
        [text], spans = render_jinja_template(
            conversations=[list(messages)],
            chat_template=_template(tokenizer),
            return_assistant_tokens_mask=marks,
            add_generation_prompt=prompt,
            **tokenizer.special_tokens_map,
        )
    except JinjaError as error:
        roles = ", ".join(turn["role"] for turn in messages)
        raise TemplateError(
            f"the chat template of {tokenizer.name_or_path!r} refuses a dialogue of the turns {roles}: {error}"
        ) from error
    return text, spans[0] if marks else []
