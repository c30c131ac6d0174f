"""From messages to token ids, by the tokenizer's chat template.

Invariants: a prompt's ids are a prefix of the ids of every dialogue that continues it, so training and generation see the same
tokens; the loss is on the assistant's turns only, including the token that ends a turn.
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
    """bool [L]: tokens of the assistant's turns."""

    def __len__(self) -> int:
        return len(self.token_ids)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> np.ndarray:
    """int32 [P]: the dialogue and the beginning of the assistant's turn. Raises `TemplateError`."""
    text = rendered(tokenizer, messages, prompt=True)
    turns = _turns(tokenizer, messages, text) or []
    return np.asarray(_token_ids(tokenizer, text, [cut for turn in turns for cut in turn])[0], dtype=np.int32)


def encode_dialogue(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> Dialogue:
    """The whole dialogue, with loss on the assistant's turns.

    A template with `{% generation %}` marks gives their positions. With any other template, a turn is the text that the
    dialogue up to this turn adds to the prompt before it, up to the end-of-sequence token.

    Raises:
        TemplateError: the template refuses the dialogue, or changes earlier turns once a dialogue goes on.
    """
    text = rendered(tokenizer, messages)
    turns = _turns(tokenizer, messages, text)
    if turns is None:
        raise TemplateError(
            f"the chat template of {tokenizer.name_or_path!r} writes earlier turns differently once a dialogue goes on, so the "
            "assistant's turns cannot be found: use a template with {% generation %} marks"
        )
    token_ids, counts = _token_ids(tokenizer, text, [cut for turn in turns for cut in turn])
    mask = np.zeros(len(token_ids), dtype=bool)
    for begin, end in zip(counts[::2], counts[1::2], strict=True):
        mask[begin:end] = True
    return Dialogue(np.asarray(token_ids, dtype=np.int32), mask)


def encode_demonstrations(
    tokenizer: PreTrainedTokenizerBase, records: Iterable[Demonstration], limit: LengthLimit
) -> Encoded[Dialogue]:
    """The dialogues within the limit."""
    return fit(records, lambda record: encode_dialogue(tokenizer, record.messages), len, limit)


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, records: Iterable[PromptRecord], limit: LengthLimit
) -> Encoded[Prompt]:
    """The prompts within the limit."""

    def encode(record: PromptRecord) -> Prompt:
        return Prompt(record.id, encode_prompt(tokenizer, record.messages), record.messages, record.metadata)

    return fit(records, encode, lambda prompt: len(prompt.token_ids), limit)


def rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, prompt: bool = False) -> str:
    """The text of the messages; with `prompt`, including the beginning of the assistant's turn.

    Raises `TemplateError` if the template refuses them.
    """
    return _render(tokenizer, messages, prompt=prompt)[0]


def _turns(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], text: str) -> list[tuple[int, int]] | None:
    """The assistant's turns in `text`, [begin, end) in characters; None if they cannot be found.

    `text` is the rendered dialogue, or the prompt that continues it.
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
    """The token ids of the text, and the number of ids before each cut (a position in characters).

    The text before a cut is tokenised as if nothing followed, as it is when the model generates from there. Usually that
    changes nothing; if a token would cross a cut (such as two line breaks around it), a new token begins at the cut.
    """
    bounds = [0, *cuts, len(text)]
    whole, *pieces = _plain_ids(tokenizer, [text, *(text[a:b] for a, b in pairwise(bounds))])
    counts = list(accumulate(map(len, pieces)))
    if list(chain.from_iterable(pieces)) == whole:
        return whole, counts[:-1]
    # A token crosses a cut, or the tokenizer puts a space before every text, as SentencePiece does: tokenise up to each cut.
    ids: list[int] = []
    done: list[int] = []
    counts, begin = [], 0
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
    except ValueError as error:  # no template, or several named ones without a default
        raise TemplateError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no default chat template: {error}"
        ) from error


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, prompt: bool = False, marks: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    """The text, and with `marks` the spans between the template's `{% generation %}` marks, in characters."""
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
            f"the chat template of {tokenizer.name_or_path!r} refuses a dialogue with the turns {roles}: {error}"
        ) from error
    return text, spans[0] if marks else []
