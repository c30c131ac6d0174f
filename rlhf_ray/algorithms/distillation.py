"""On-policy distillation: a student learns from its own samples to match a teacher.

Both forms minimise `mean_t KL(student || teacher)` over the states that the student visits. These states are taken as given: the
effect of a token on later states is left out, as in GKD (arXiv 2306.13649); MiniLLM (arXiv 2306.08543) includes it.
`per_token_advantages` is the score-function estimate from the sampled tokens, `reverse_kl` the exact value and gradient.

Invariants: both are zero, with zero gradient, if student and teacher are the same (oracle 23); both are per token, and the caller
aggregates.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from rlhf_ray.algorithms.logprobs import row_chunks, scaled_logits
from rlhf_ray.algorithms.token_weights import masked_log_ratio


def per_token_advantages(teacher_logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """`log pi_T - log pi_old` of each sampled token, in nats; detached, 0 where masked, any one shape.

    At ratio 1 the expected policy gradient of these is minus the gradient of `KL(student || teacher)` of each token's
    distribution, because the mean of a score function is zero.
    """
    return masked_log_ratio(teacher_logprobs.detach(), old_logprobs.detach(), mask)


def reverse_kl(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """`KL(softmax(z / T) || softmax(z_T / T))` of each row, in nats, differentiable in the student's logits z.

    Models of one family pad their vocabularies to different widths; then both distributions are over the tokens that both have.

    Args: logits [N, V], teacher_logits [N, V'], any floating types; temperature > 0, the sampler's.
    Returns: [N], float32 (float64 for float64 logits).
    Raises ValueError for a temperature that is not positive, or rows that do not fit.
    """
    if not temperature > 0.0:
        raise ValueError(f"temperature={temperature} must be > 0")
    if logits.dim() != 2 or teacher_logits.dim() != 2 or len(logits) != len(teacher_logits):
        raise ValueError(
            f"need logits [N, V] of student and teacher, got {tuple(logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    shared = min(logits.shape[1], teacher_logits.shape[1])
    return _ReverseKL.apply(logits[:, :shared], teacher_logits[:, :shared].detach(), temperature)


class _ReverseKL(torch.autograd.Function):
    """Saves both logits and computes their softmax again, by chunks, in the backward pass: no third table of [N, V]."""

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(logits, teacher_logits)
        ctx.temperature = temperature
        dtype = torch.promote_types(logits.dtype, torch.float32)
        divergence = torch.empty(len(logits), dtype=dtype, device=logits.device)
        for rows in row_chunks(logits):
            probabilities, log_ratio = _tables(logits[rows], teacher_logits[rows], temperature, dtype)
            divergence[rows] = (probabilities * log_ratio).sum(dim=-1)
        return divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        """`d KL / d z = p (log p - log q - KL) / T`."""
        logits, teacher_logits = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        for rows in row_chunks(logits):
            probabilities, log_ratio = _tables(logits[rows], teacher_logits[rows], ctx.temperature, dtype)
            divergence = (probabilities * log_ratio).sum(dim=-1, keepdim=True)
            upstream = (grad[rows] / ctx.temperature).unsqueeze(1)
            grad_logits[rows] = (log_ratio.sub_(divergence).mul_(probabilities).mul_(upstream)).to(logits.dtype)
        return grad_logits, None, None


def _tables(logits: Tensor, teacher_logits: Tensor, temperature: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """p and log p - log q, [n, V] each; the log-ratio is 0 for a token of probability 0."""
    ours = torch.log_softmax(scaled_logits(logits, temperature, dtype), dim=-1, dtype=dtype)
    theirs = torch.log_softmax(scaled_logits(teacher_logits, temperature, dtype), dim=-1, dtype=dtype)
    impossible = ours == -torch.inf
    return ours.exp(), (ours - theirs).masked_fill_(impossible, 0.0)
