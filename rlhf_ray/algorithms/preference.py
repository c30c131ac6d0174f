"""Learning a reward from choices between two responses: the Bradley-Terry model.

Invariants: the loss depends on the difference of the rewards only, unless centring asks for more; without a margin,
equal rewards cost log 2.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0, centring: float = 0.0) -> Tensor:
    """`-log sigmoid(chosen - rejected - margin) + centring * (chosen + rejected)^2`, per pair.

    Args:
        chosen, rejected: rewards [P].
        margin: [P] or a number; how far apart the annotators saw the two (Llama 2, arXiv 2307.09288).
        centring: coefficient of the term that keeps rewards around zero (arXiv 2312.09244); 0.01 is usual, 0 leaves the
            offset of the rewards free.

    Returns: [P].
    """
    loss = -logsigmoid(chosen - rejected - margin)
    return loss + centring * (chosen + rejected).square() if centring else loss


def pair_accuracy(chosen: Tensor, rejected: Tensor) -> Tensor:
    """1 where the chosen response has the higher reward, 1/2 for a tie, 0 otherwise; [P], float32.

    A tie counts half, so that a constant reward is at 50 % and not at 0.
    """
    return 0.5 * (1.0 + torch.sign(chosen.detach() - rejected.detach()).float())
