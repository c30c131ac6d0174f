"""From one score per response to one reward per token.

Invariant: the rewards of a row sum to `score - beta * sum(KL estimates)` over its valid tokens; with k1 that is the
sequence reward of Ziegler et al. 2019 (arXiv 1909.08593, section 2). The score is placed at the last valid token, which is
the end-of-sequence token of a finished response. Masked tokens get zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_ray.algorithms.kl import kl_estimator


def token_rewards(
    scores: Tensor,
    logprobs: Tensor,
    reference_logprobs: Tensor | None,
    mask: Tensor,
    beta: float,
    estimator: str = "k1",
) -> Tensor:
    """`-beta * KL estimate` at each valid token, plus the score at the last one.

    With k1, `logprobs - reference_logprobs`, the policy gradient of these rewards (as returns to go) is exactly that of
    `E[score] - beta * KL(policy || reference)`. With k3 it is that of `KL(policy || reference) - KL(reference || policy)`
    instead of the KL, and with k2 of yet another term: less noise, but another objective.

    Args:
        scores: [B], one per response.
        logprobs: [B, T], under the policy from which the update starts.
        reference_logprobs: [B, T]; may be None if `beta` is 0.
        mask: [B, T]. A row without a valid token gets no reward, not even its score.
        beta: coefficient of the KL penalty, per nat.
        estimator: k1, k2 or k3 (see `kl`).

    Returns: [B, T], detached.
    Raises ValueError if `beta` is not 0 and there are no reference log-probabilities.
    """
    valid = mask.bool()
    if beta != 0.0 and reference_logprobs is None:
        raise ValueError(
            f"a KL penalty of beta={beta} needs reference_logprobs, got None: run a reference worker or set 0"
        )
    if beta == 0.0 or reference_logprobs is None:
        rewards = torch.zeros_like(logprobs)
    else:
        rewards = -beta * kl_estimator(estimator)(logprobs.detach(), reference_logprobs.detach(), valid)
    return rewards + at_last_token(scores.to(rewards.dtype), valid)


def at_last_token(per_response: Tensor, mask: Tensor) -> Tensor:
    """[B] → [B, T]: each row's value at its last valid token and 0 elsewhere; nothing in a row without a valid token."""
    valid = mask.bool()
    steps = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    last = (valid * steps).argmax(dim=1, keepdim=True)
    placed = torch.where(valid.any(dim=1), per_response, 0.0).unsqueeze(1)
    return placed.new_zeros(mask.shape).scatter_add(1, last, placed)


def score_unfinished(scores: Tensor, finished: Tensor, penalty: float) -> Tensor:
    """Scores [B] with those of truncated responses lowered by `penalty` (TRL's `missing_eos_penalty`).

    `finished` is bool [B]: the response ended with an end-of-sequence or stop token. Raises ValueError for a negative penalty.
    """
    if penalty < 0.0:
        raise ValueError(f"penalty={penalty} would reward truncated responses; it is subtracted, so give a value >= 0")
    return torch.where(finished.bool(), scores, scores - penalty)


def soft_overlong_punishment(lengths: Tensor, max_length: int, buffer: int, penalty: float = 1.0) -> Tensor:
    """0 up to `max_length - buffer`, then linearly down to `-penalty` at `max_length` (DAPO, arXiv 2503.14476).

    `((max_length - buffer) - length) / buffer`, between -1 and 0, times `penalty`.

    Args: lengths: [B], in tokens; max_length: the response limit; buffer: punished range below the limit; penalty: ≥ 0.
    Returns: float [B]. Raises ValueError for a buffer outside [1, max_length] or a negative penalty.
    """
    if not 1 <= buffer <= max_length:
        raise ValueError(f"buffer={buffer} must be between 1 and max_length={max_length} tokens")
    if penalty < 0.0:
        raise ValueError(f"penalty={penalty} would reward long responses; it is subtracted, so give a value >= 0")
    excess = (lengths - (max_length - buffer)).clamp(0, buffer)
    return -penalty * excess.float() / buffer
