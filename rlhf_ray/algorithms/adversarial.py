"""Learning a reward from demonstrations: a discriminator tells them from the policy's own samples (GAIL, arXiv 1606.03476).

The discriminator's logit f estimates the log of the ratio of the two densities: `D = σ(f)`, and at the optimum of the loss
`f* = log π_E / π`. As a reward, `log D − log(1 − D) = f` (AIRL, arXiv 1710.11248) measures how far the policy is from
imitating: its mean under the policy is `−KL(π ‖ π_E)`.

Invariants: losses are elementwise, so with weights over the global batch the sum does not depend on how it is split;
demonstrations and samples each have half of the total weight, whatever their numbers.
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
        smoothing: ε, from 0 to below ½: demonstrations have the label 1 − ε (one-sided, arXiv 1606.03498), which bounds the
            logit: f* = log((1 − ε) π_E / (π + ε π_E)) < log((1 − ε) / ε).

    Raises:
        ValueError: `smoothing` is outside its range.
    """
    if not 0 <= smoothing < 0.5:
        raise ValueError(f"smoothing {smoothing}: must be at least 0 and below 0.5")
    label = demonstrated.to(logits.dtype) * (1.0 - smoothing)
    return -(label * logsigmoid(logits) + (1.0 - label) * logsigmoid(-logits))


def balanced_weights(demonstrated: np.ndarray) -> np.ndarray:
    """Weights, float32 [B], that give demonstrations and samples half of the total each. The weighted loss is log 2 at logits 0.

    Args:
        demonstrated: bool [B].

    Raises:
        ValueError: there are no demonstrations or no samples.
    """
    positives = int(demonstrated.sum())
    negatives = len(demonstrated) - positives
    if not positives or not negatives:
        raise ValueError(f"a discriminator's batch needs both; got {positives} demonstrations and {negatives} samples")
    return np.where(demonstrated, 0.5 / positives, 0.5 / negatives).astype(np.float32)


def imitation_reward(logits: Tensor, clip: float) -> Tensor:
    """`log D − log(1 − D) = f`, [B], clipped to ±`clip`."""
    return logits.clamp(-clip, clip)


def is_sufficient(accuracy: float, loss: float, bound: float) -> bool:
    """Whether a discriminator can skip an update: its accuracy is above `bound` and its loss below the entropy of `bound`, nats.

    The condition on the loss is for a fresh discriminator that happens to be right with logits close to 0: by accuracy alone it
    would never learn, and its reward would stay close to 0.
    """
    if bound >= 1:
        return False
    return accuracy > bound and loss < -bound * math.log(bound) - (1 - bound) * math.log(1 - bound)


def discriminator_accuracy(logits: Tensor, demonstrated: Tensor) -> Tensor:
    """1 where the sign of f is right, ½ for f = 0, 0 otherwise; [B], float32.

    Its mean with `balanced_weights` is ½ if the discriminator does not distinguish the two sides.
    """
    side = torch.where(demonstrated, 1.0, -1.0)
    return 0.5 * (1.0 + side * torch.sign(logits.detach()).float())
