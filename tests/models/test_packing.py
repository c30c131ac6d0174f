"""Packing gives the same as padding (oracle 18) for every head, values and gradients; unsuitable models are refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rlhf_ray.batch import Batch, ModelInput, pack, pack_sequences, pad
from rlhf_ray.models import packing
from rlhf_ray.models.heads import SequenceScores, TokenLogprobs, TokenValues
from rlhf_ray.models.packing import NotPackable, enable_packing

VOCABULARY = 40
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
    "attn_implementation": "sdpa", "pad_token_id": 0,
}  # fmt: skip
LENGTHS = st.lists(st.integers(2, 24), min_size=1, max_size=7)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def heads(dtype: torch.dtype) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Each head twice with the same weights: one reads padded and the other packed input."""
    torch.manual_seed(0)
    language, scalar = LlamaConfig(**SIZES), LlamaConfig(**SIZES, num_labels=2)
    one_row = LlamaConfig(**SIZES, num_labels=1)
    padded = {
        "logprobs": TokenLogprobs(LlamaForCausalLM(language)),
        "logprobs, qwen2": TokenLogprobs(Qwen2ForCausalLM(Qwen2Config(**SIZES)), temperature=0.7),
        "logprobs, window": TokenLogprobs(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5))),
        "values": TokenValues(LlamaForSequenceClassification(one_row)),
        "scores": SequenceScores(LlamaForSequenceClassification(scalar)),
    }
    return {name: (head.to(dtype), _packing(copy.deepcopy(head).to(dtype))) for name, head in padded.items()}


def _packing(head: nn.Module) -> nn.Module:
    enable_packing(head.model, head, exact=True)
    return head


HEADS = {dtype: heads(dtype) for dtype in TOLERANCE}


def ragged(lengths: list[int], seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    masks = [np.arange(n) >= rng.integers(1, n) for n in lengths]
    return pack_sequences([rng.integers(1, VOCABULARY, n) for n in lengths], masks)


def measure(head: nn.Module, inputs: ModelInput, seed: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Results, and the gradients of a loss that weighs each of them differently."""
    head.zero_grad()
    result = head(inputs)
    result = result[0] if isinstance(result, tuple) else result
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(seed)).to(result.dtype)
    (weights * result).sum().backward()
    return result.detach(), [p.grad for p in head.parameters() if p.grad is not None]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", HEADS[torch.float32])
@settings(max_examples=20, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 1000))
def test_oracle_18_packing_is_padding(name, dtype, lengths, seed):
    batch = ragged(lengths, seed)
    padded, packed = HEADS[dtype][name]
    theirs, their_gradients = measure(padded, pad(batch), seed)
    ours, our_gradients = measure(packed, pack(batch), seed)
    # Heads return float32 for any dtype of the model.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=max(TOLERANCE[dtype], 1e-5))
    assert len(our_gradients) == len(their_gradients) > 10
    for mine, yours in zip(our_gradients, their_gradients, strict=True):
        scale = float(yours.abs().max()) + 1e-3
        assert float((mine - yours).abs().max()) <= max(TOLERANCE[dtype], 1e-6) * max(1.0, scale)


def test_neighbours_and_their_order_change_nothing():
    """A sequence gives the same alone, first or last in a row."""
    _, head = HEADS[torch.float32]["logprobs"]
    batch = ragged([9, 17, 3], 1)
    counts = batch.target_counts
    with torch.no_grad():
        together = head(pack(batch))[0].split(counts.tolist())
        backwards = head(pack(batch.select([2, 1, 0])))[0].split(counts[::-1].tolist())[::-1]
        for index in range(3):
            alone = head(pack(batch.select([index])))[0]
            torch.testing.assert_close(together[index], alone, rtol=0, atol=1e-5)
            torch.testing.assert_close(backwards[index], alone, rtol=0, atol=1e-5)


def test_gradient_checkpointing_recomputes_within_the_boundaries():
    """With checkpointing the backward pass repeats the forward pass, which needs the boundaries again."""
    plain, packed = (copy.deepcopy(head) for head in HEADS[torch.float32]["logprobs"])
    packed.model.gradient_checkpointing_enable({"use_reentrant": False})
    packed.train()
    batch = ragged([12, 5, 8], 2)
    _, theirs = measure(plain, pad(batch), 0)
    _, ours = measure(packed, pack(batch), 0)
    for mine, yours in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-3, atol=1e-4)


def test_a_model_that_mixes_sequences_is_refused(monkeypatch):
    """A model without this attention would attend over the whole row."""

    def across(module, query, key, value, attention_mask, packed_lengths=None, **settings):
        return sdpa(module, query, key, value, None, **settings)

    sdpa = packing.sdpa_attention_forward
    monkeypatch.setitem(packing.AttentionInterface._global_mapping, packing.SDPA, across)
    head = TokenLogprobs(LlamaForCausalLM(LlamaConfig(**SIZES)))
    with pytest.raises(NotPackable, match=r"'llama' gives results that differ by .* set packing: false"):
        enable_packing(head.model, head, exact=True)


def test_layer_types_that_mix_sequences_are_refused():
    config = Qwen2Config(**SIZES)
    head = TokenLogprobs(Qwen2ForCausalLM(config))
    config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(NotPackable, match="'qwen2' has linear_attention layers"):
        enable_packing(head.model, head, exact=True)


def test_attention_without_the_boundaries_raises():
    """The row must not be read as one sequence silently."""
    _, head = HEADS[torch.float32]["logprobs"]
    with pytest.raises(NotPackable, match="does not pass the lengths of sequences to its attention"):
        head(pad(ragged([4, 6], 0)))
