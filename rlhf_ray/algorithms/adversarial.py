"""Learning a reward from demonstrations: a discriminator of demonstrations and the policy's own samples (GAIL, arXiv 1606.03476).

The discriminator's logit f estimates the log of the ratio of the two densities: `D = σ(f)`, and at the optimum of the loss
`f* = log π_E / π`. As a reward, `log D − log(1 − D) = f` (AIRL, arXiv 1710.11248) pays exactly what is missing to imitate: its
mean under the policy is `−KL(π ‖ π_E)`.

Invariants: losses are elementwise, so weights over the global batch make the sum the same however it is split; each side counts
half, however many sequences it has.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def discriminator_loss(logits: Tensor, demonstrated: Tensor, smoothing: float = 0.0) -> Tensor:
    """`−log σ(f)` of demonstrations and `−log(1 − σ(f))` of samples, per sequence, [B], nats.

    Args:
        logits: f, [B].
        demonstrated: bool [B].
        smoothing: ε, from 0 to below ½: demonstrations have the label 1 − ε (one-sided, arXiv 1606.03498), so that confidence
            in them is bounded: f* = log((1 − ε) π_E / (π + ε π_E)) < log((1 − ε) / ε).

    Raises:
        ValueError: `smoothing` is outside its range.
    """
    if not 0 <= smoothing < 0.5:
        raise ValueError(f"smoothing {smoothing}: must be at least 0 and below 0.5, the label of a coin")
    label = demonstrated.to(logits.dtype) * (1.0 - smoothing)
    return -(label * logsigmoid(logits) + (1.0 - label) * logsigmoid(-logits))


def balanced_weights(demonstrated: np.ndarray) -> np.ndarray:
    """float32 [B]: with them the sum of the losses is the mean of each side's mean, so it is log 2 for a discriminator that knows
    nothing.

    Args:
        demonstrated: bool [B].

    Raises:
        ValueError: one side is empty: there is nothing to tell apart.
    """
    positives = int(demonstrated.sum())
    negatives = len(demonstrated) - positives
    if not positives or not negatives:
        raise ValueError(
            f"a discriminator needs both sides in its batch; got {positives} demonstrations and {negatives} samples"
        )
    return np.where(demonstrated, 0.5 / positives, 0.5 / negatives).astype(np.float32)


def imitation_reward(logits: Tensor, clip: float) -> Tensor:
    """`log D − log(1 − D) = f`, [B], within ±`clip`: a discriminator that is sure beyond it pays and fines no more for that."""
    return logits.clamp(-clip, clip)


def is_sufficient(accuracy: float, loss: float, bound: float) -> bool:
    """Whether a discriminator need not learn for now: it is right more often than `bound`, and as sure of it as that warrants.

    Being sure is a loss below the entropy of `bound`, nats. Without it a fresh discriminator that happens to be right, by scores
    that are all but 0, would never learn and pay nothing.
    """
    if bound >= 1:
        return False
    return accuracy > bound and loss < -bound * math.log(bound) - (1 - bound) * math.log(1 - bound)


def discriminator_accuracy(logits: Tensor, demonstrated: Tensor) -> Tensor:
    """1 where the sign of f is right, ½ for f = 0, 0 otherwise; [B], float32.

    Its mean by `balanced_weights` is ½ where nothing is told apart.
    """
    side = torch.where(demonstrated, 1.0, -1.0)
    return 0.5 * (1.0 + side * torch.sign(logits.detach()).float())
