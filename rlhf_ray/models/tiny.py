"""Builds a tiny language model: a trained byte-level BPE tokenizer and random weights, as an ordinary Hugging Face folder.

With it the real engines run on a laptop. Invariants: the same arguments give the same files; the folder is complete when it
appears; padding and end of turn are different tokens, and the end of turn is the end of the sequence; `AutoTokenizer` loads
exactly the trained tokenizer.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

Architecture = Literal["llama", "qwen2"]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML, with the assistant's tokens marked for the loss."""

_PIECES: dict[Architecture, str] = {"llama": r" ?\p{L}+| ?\d{1,3}| ?[^\s\p{L}\d]+|\s+", "qwen2": PRETOKENIZE_REGEX}
"""The pieces across which BPE never merges: words, numbers of up to three digits, punctuation. For Qwen2, `AutoTokenizer` always
uses Qwen2's own pattern, in which each digit is a piece, so the tokenizer is trained with it."""

_MODELS = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, max_positions: int, architecture: Architecture = "llama"
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with a chat template. Any text (in normal form C) survives encoding and decoding.

    Raises ValueError if `vocab_size` is too small for the bytes and the special tokens.
    """
    specials = [PAD, TURN_START, TURN_END]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(specials):
        raise ValueError(
            f"vocab_size {vocab_size}: must be at least {len(alphabet) + len(specials)}, the bytes and special tokens"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES[architecture]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    if architecture == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, initial_alphabet=sorted(alphabet), show_progress=False
    )
    # Roles are in every prompt. As whole words they cost one token.
    tokenizer.train_from_iterator([*texts, *["system\n", "user\n", "assistant\n"] * 1000], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=TURN_END,
        additional_special_tokens=[TURN_START],
        model_max_length=max_positions,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def build_tiny_model(
    folder: Path,
    texts: Iterable[str],
    *,
    architecture: Architecture = "llama",
    vocab_size: int = 512,
    hidden_size: int = 128,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    intermediate_size: int | None = None,
    max_positions: int = 512,
    seed: int = 0,
) -> int:
    """Write a randomly initialised causal model (fp32, tied embeddings) and its tokenizer; returns the number of parameters.

    `texts` train the tokenizer, whose vocabulary has at most `vocab_size` entries. `intermediate_size` is 3 x `hidden_size` by
    default. Raises FileExistsError if `folder` exists, ValueError if the sizes do not fit together.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists: a new model needs a new folder")
    if architecture not in _MODELS:
        raise ValueError(f"architecture {architecture!r}: allowed are {', '.join(_MODELS)}")
    if hidden_size % heads or heads % kv_heads:
        raise ValueError(
            f"hidden_size {hidden_size} must be a multiple of heads {heads}, and heads of kv_heads {kv_heads}"
        )
    tokenizer = train_tokenizer(texts, vocab_size, max_positions, architecture)
    make_config, make_model = _MODELS[architecture]
    config = make_config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate_size or 3 * hidden_size,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        # The usual 0.02 suits wide models; a narrow one learns several times faster from logits of unit variance.
        initializer_range=hidden_size**-0.5,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    # The caller's random state must not change.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make_model(config)
    model.generation_config = GenerationConfig(
        do_sample=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    _save(folder, model, tokenizer)
    return sum(parameter.numel() for parameter in model.parameters())


def _save(folder: Path, model: Qwen2ForCausalLM | LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        draft.chmod(0o755)
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
