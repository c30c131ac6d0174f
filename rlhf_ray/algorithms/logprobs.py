"""Log-probabilities of given tokens, and the entropy, from logits, without a float32 copy of the logits.

A vocabulary of 150,000 makes the logits the largest tensor of a training step. Plain autograd keeps the logits, their
float32 copy and their log-softmax; here only the logits are kept, and the softmax is computed again in the
backward pass, a chunk of rows at a time.

Invariants: the arithmetic is in float32 at least, whatever the type of the logits; memory in addition to the logits and their
gradient is bounded by `CHUNK_ELEMENTS`, with or without a gradient of the entropy.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}
"""Float32 elements in a chunk: as many as fit into a CPU's cache, or enough to fill a GPU (256 MiB)."""


def token_logprobs_and_entropy(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, with_entropy: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target and entropy of each row, in nats, of `softmax(logits / temperature)`.

    Args:
        logits: [N, V], any floating type. A logit of -inf is a token that cannot be sampled.
        targets: int64 [N]. Masked rows must hold a valid token id, too.
        temperature: > 0, the same as the sampler's.
        with_entropy: False saves a pass over the logits.

    Returns: logprobs [N] and entropy [N] (or None), both differentiable; float32 (float64 for float64 logits).
    Raises ValueError for a temperature that is not positive or shapes that do not fit.
    """
    if not temperature > 0.0:
        raise ValueError(f"temperature={temperature} must be > 0: greedy sampling has no log-probabilities to train on")
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"need logits [N, V] and targets [N], got {tuple(logits.shape)} and {tuple(targets.shape)}")
    return _TokenLogprobs.apply(logits, targets, temperature, with_entropy)


class _TokenLogprobs(torch.autograd.Function):
    """Saves the logits, which the previous layer keeps anyway, and recomputes the softmax by chunks."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, logits: Tensor, targets: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(logits, targets)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        logprobs = torch.empty(len(logits), dtype=dtype, device=logits.device)
        entropy = torch.empty_like(logprobs) if with_entropy else None
        for rows in row_chunks(logits):
            table = torch.log_softmax(scaled_logits(logits[rows], temperature, dtype), dim=-1, dtype=dtype)
            logprobs[rows] = table.gather(1, targets[rows].unsqueeze(1)).squeeze(1)
            if entropy is not None:
                table.clamp_(min=torch.finfo(dtype).min)  # because 0 * -inf, for a token that cannot be sampled, is NaN
                entropy[rows] = table.exp().mul_(table).sum(dim=-1).neg_()
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, grad: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, None, None, None]:
        """`d logprob_y / d z = (1[y] - p) / T` and `d H / d z = -p (log p + H) / T`, with p recomputed by chunks."""
        if grad is None and grad_entropy is None:
            return None, None, None, None
        logits, targets = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        for rows in row_chunks(logits):
            scaled = scaled_logits(logits[rows], ctx.temperature, dtype)
            table: Tensor | float = 0.0
            if grad is not None:
                table = _logprob_gradient(scaled, targets[rows], dtype, (grad[rows] / ctx.temperature).unsqueeze(1))
            if grad_entropy is not None:
                upstream = (grad_entropy[rows] / ctx.temperature).unsqueeze(1)
                table = _entropy_gradient(scaled, dtype).mul_(upstream).add_(table)
            grad_logits[rows] = table
        return grad_logits, None, None, None


def _logprob_gradient(scaled: Tensor, targets: Tensor, dtype: torch.dtype, upstream: Tensor) -> Tensor:
    """`upstream * (1[target] - p)` of each row's softmax; upstream: [n, 1]."""
    table = torch.softmax(scaled, dim=-1, dtype=dtype)
    return table.mul_(-upstream).scatter_add_(1, targets.unsqueeze(1), upstream)


def _entropy_gradient(scaled: Tensor, dtype: torch.dtype) -> Tensor:
    """`-p (log p + H)` of each row's softmax."""
    table = torch.log_softmax(scaled, dim=-1, dtype=dtype).clamp_(min=torch.finfo(dtype).min)
    probabilities = table.exp()
    negative_entropy = (probabilities * table).sum(dim=-1, keepdim=True)
    return table.sub_(negative_entropy).mul_(probabilities).neg_()


def row_chunks(logits: Tensor) -> list[slice]:
    """Ranges of rows with at most `CHUNK_ELEMENTS` elements, at least one row each."""
    rows = max(1, CHUNK_ELEMENTS.get(logits.device.type, 2**26) // max(1, logits.shape[1]))
    return [slice(start, start + rows) for start in range(0, len(logits), rows)]


def scaled_logits(logits: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """`logits / temperature` in `dtype`; at temperature 1 the logits as they are, in their own type."""
    return logits if temperature == 1.0 else logits.to(dtype) / temperature
