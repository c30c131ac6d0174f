"""Records as a model sees them: how many tokens they have, and which of them would be learned."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from rlhf_ray.data.check import Lengths, answers_of, lengths, prompt_of
from rlhf_ray.data.limits import Record
from rlhf_ray.data.tokenize import Dialogue, encode_dialogue, encode_prompt
from rlhf_ray.models.loading import check_model_folder, load_tokenizer, local_folder


@dataclass(frozen=True)
class TokenCounts:
    """Of whole dialogues: a prompt with one answer, or without where there is none."""

    dialogues: Lengths
    prompts: Lengths
    learned: float
    """Share of the dialogues' tokens that the assistant says: those that a fine-tuning learns."""
    too_long: int | None
    """Records with a dialogue above the limit."""


def load_for_counting(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub name. Raises NotAModel."""
    folder = local_folder(model)
    check_model_folder(folder, "--model")
    return load_tokenizer(folder)


def count_tokens(tokenizer: PreTrainedTokenizerBase, records: Iterable[Record], limit: int | None) -> TokenCounts:
    """Token counts by the tokenizer's own chat template."""
    encoded = [dialogues(tokenizer, record) for record in records]
    prompts = [len(encode_prompt(tokenizer, prompt_of(record))) for record in records]
    everything = [dialogue for record in encoded for dialogue in record]
    learned = sum(int(dialogue.loss_mask.sum()) for dialogue in everything)
    above = None if limit is None else sum(max(map(len, record)) > limit for record in encoded)
    total = sum(map(len, everything))
    return TokenCounts(lengths([len(d) for d in everything]), lengths(prompts), learned / total, above)


def dialogues(tokenizer: PreTrainedTokenizerBase, record: Record) -> list[Dialogue]:
    """Each answer with its prompt before it, the chosen or best-placed one first as the record has them."""
    prompt = prompt_of(record)
    return [encode_dialogue(tokenizer, prompt + answer) for answer in answers_of(record) or ((),)]
