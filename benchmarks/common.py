"""Shared parts of the benchmarks: random models that stop by chance, prompts, a reward, and the report of results.

Invariants: models, prompts and reward depend on their arguments only, so that both sides of a ratio get the same ones; a
benchmark prints one table for people and, as its last line, one JSON object for programs.
"""

from __future__ import annotations

import json
import os
import string
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

VOCABULARY = ("<pad>", "<eos>", *string.ascii_letters, *string.digits)
"""64 tokens of one character: an untrained model ends a response with probability 1/64 at each token."""
PROMPT_TOKENS = 16
SIZES = {
    "small": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4},
    "medium": {"hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": 8, "num_attention_heads": 8},
    "large": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 13, "num_attention_heads": 16},
}
"""Qwen2-style models of 0.8, 28 and 204 million parameters."""


def build_model(folder: Path, size: str) -> int:
    """Write a randomly initialised model and its tokenizer as a Hugging Face folder. Returns the number of parameters."""
    torch.manual_seed(0)
    heads = SIZES[size]["num_attention_heads"]
    config = Qwen2Config(
        vocab_size=len(VOCABULARY),
        num_key_value_heads=heads // 2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        dtype="float32",
        **SIZES[size],
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, eos_token_id=1, pad_token_id=0)
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return model.num_parameters()


def _tokenizer() -> Qwen2Tokenizer:
    return Qwen2Tokenizer(
        vocab={token: number for number, token in enumerate(VOCABULARY)},
        merges=[],
        unk_token=VOCABULARY[0],
        pad_token=VOCABULARY[0],
        eos_token=VOCABULARY[1],
        # A prompt's tokens are its characters only.
        chat_template="{{ messages[0]['content'] }}",
    )


def make_prompts(count: int) -> list[str]:
    """`count` different prompts of `PROMPT_TOKENS` characters."""
    draws = np.random.default_rng(0).integers(2, len(VOCABULARY), (count, PROMPT_TOKENS))
    return ["".join(VOCABULARY[token] for token in row) for row in draws]


def share_of_lower_case(texts: Sequence[str]) -> list[float]:
    """The reward: the share of lower-case letters in each text, between 0 and 1."""
    return [sum(map(str.islower, text)) / max(1, len(text)) for text in texts]


def reward(prompts: Sequence, responses: Sequence[str], metadata: Sequence) -> list[float]:
    """`share_of_lower_case` with the signature of this project's reward functions."""
    return share_of_lower_case(responses)


def load_average() -> float:
    """Load average of the last minute. If other processes add to it, figures are unreliable."""
    return round(os.getloadavg()[0], 2)


def report(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], record: dict) -> None:
    """Print the table and the JSON line. Floats are shown with three significant digits."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    for row in rows:
        table.add_row(*(_shown(cell) for cell in row))
    Console(width=max(100, 14 * len(columns))).print(table)
    machine = {"cores": os.cpu_count(), "torch": torch.__version__, "load": load_average()}
    print(json.dumps({**record, "machine": machine}))


def _shown(cell: object) -> str:
    if not isinstance(cell, float):
        return str(cell)
    return f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:.3g}"
