"""Packs several sequences into one row of a model. Only attention has to keep them apart.

With `sdpa`, attention runs over one sequence after another with PyTorch's causal kernels, which costs Σ length² and not
(Σ length)²; everything else runs once over all tokens. `flash_attention_2` has variable-length kernels for packed sequences.

Invariants: a packed model gives the same results as with padding, which is checked before it is used; attention without the
sequence boundaries raises an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlhf_ray.batch import Batch, ModelInput, pack, pad
from rlhf_ray.errors import InputError

SDPA = "packed_sdpa"
"""The name of this attention in transformers. It has no mask function there, so models pass no mask."""
_LAYERS = {"full_attention", "sliding_attention"}
"""Types of layers that do not mix the sequences of a row."""


class NotPackable(InputError, ValueError):
    """A model would mix the sequences of a row."""


def enable_packing(model: nn.Module, forward: Callable[[ModelInput], Any], exact: bool) -> None:
    """Let a Hugging Face model, loaded with `sdpa` or `flash_attention_2`, read packed input, and check its results.

    Args:
        model: the Hugging Face model.
        forward: the model with its wrappers; returns results for the targets, or a tuple that starts with them. Collective if the
            model is sharded.
        exact: the model computes in float32, so results must agree to 1e-3 of their std; otherwise to 0.1.

    Raises:
        NotPackable: a layer mixes the sequences.
    """
    kinds = set(getattr(model.config, "layer_types", None) or ()) - _LAYERS
    if kinds:
        raise NotPackable(_refusal(model, f"has {', '.join(sorted(kinds))} layers, which mix the sequences of a row"))
    example = _example(model.config.get_text_config().vocab_size)
    with torch.no_grad():
        padded = _first(forward(pad(example, model.device)))
        if model.config._attn_implementation == "sdpa":
            model.set_attn_implementation(SDPA)
        packed = _first(forward(pack(example, model.device)))
    allowed = (1e-3 if exact else 0.1) * float(padded.nan_to_num().std())
    # NaN weights are not reported here.
    if not torch.allclose(packed, padded, rtol=0.0, atol=allowed, equal_nan=True):
        difference = float((packed - padded).abs().max())
        raise NotPackable(
            _refusal(model, f"gives results that differ by {difference:.2g} between packed and padded sequences")
        )


def boundaries(model: nn.Module, batch: ModelInput) -> dict[str, Any]:
    """The arguments that tell the model's attention the boundaries of packed sequences; none for padded ones."""
    if batch.packed_lengths is None:
        return {}
    if model.config._attn_implementation == SDPA:
        return {"position_ids": batch.position_ids, "packed_lengths": batch.packed_lengths}
    ends = torch.tensor((0, *np.cumsum(batch.packed_lengths)), dtype=torch.int32, device=batch.input_ids.device)
    longest = max(batch.packed_lengths)
    return {
        "position_ids": batch.position_ids,
        "cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest,
    }  # fmt: skip


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    packed_lengths: tuple[int, ...] | None = None,
    sliding_window: int | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of a row, with the interface of transformers.

    Args:
        query: [1, heads, N, d]; `key` and `value` [1, key/value heads, N, d].
        packed_lengths: the tokens of each sequence; their sum is N.
        sliding_window: the number of tokens that a token attends to, itself included; None for all earlier ones.

    Returns:
        [1, N, heads, d].

    Raises:
        NotPackable: the model did not pass on the lengths.
    """
    if packed_lengths is None:
        raise NotPackable(_refusal(module, "does not pass the lengths of sequences to its attention"))
    parts = zip(*(states.split(packed_lengths, dim=2) for states in (query, key, value)), strict=True)
    results = [sdpa_attention_forward(module, *qkv, _window(qkv[0], sliding_window), **settings)[0] for qkv in parts]
    return torch.cat(results, dim=1), None


AttentionInterface.register(SDPA, packed_attention)


def _window(query: Tensor, window: int | None) -> Tensor | None:
    """The attention mask, bool [T, T]; None if causal attention needs no mask."""
    length = query.shape[2]
    if window is None or length <= window:
        return None
    places = torch.arange(length, device=query.device)
    distance = places[:, None] - places[None, :]
    return (distance >= 0) & (distance < window)


def _first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def _refusal(model: nn.Module, reason: str) -> str:
    return f"a model of type {model.config.model_type!r} {reason}; set packing: false for it"


def _example(vocabulary: int) -> Batch:
    """Three sequences of different lengths."""
    lengths = np.asarray([9, 5, 7])
    first = np.cumsum(lengths) - lengths
    tokens = np.arange(lengths.sum(), dtype=np.int32) % vocabulary
    return Batch(tokens, lengths, ~np.isin(np.arange(len(tokens)), first))
