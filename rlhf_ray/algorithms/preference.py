"""Learning a reward from comparisons of two responses: the Bradley-Terry model and what people really say.

Invariants: a loss depends on the difference of two rewards only (centring apart); with clear choices, without margins,
equal rewards cost log 2; naming the responses in the other order, with one minus the preference, changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    preference: Tensor | float = 1.0,
    margin: Tensor | float = 0.0,
    reliability: Tensor | None = None,
) -> Tensor:
    """`-q log P(chosen) - (1 - q) log P(rejected)`, per pair, with P(chosen) = sigmoid(chosen - rejected - margin).

    Args:
        chosen, rejected: rewards [P].
        preference: q, [P] or a number: probability that `chosen` is the better one; 1 is a clear choice, 1/2 a tie.
        margin: [P] or a number, in units of reward: how far apart the annotators saw the two (Llama 2, arXiv
            2307.09288). Whichever response is the better one has to be so by the margin.
        reliability: η, [P], strictly between 0 and 1: how often the pair's annotator means what they say. Then
            P(chosen) = η sigmoid(Δ) + (1 - η) sigmoid(-Δ) (Crowd-BT: Chen et al., WSDM 2013). None: always.

    Returns: [P], nats.
    """
    right, wrong = logsigmoid(chosen - rejected - margin), logsigmoid(rejected - chosen - margin)
    if reliability is not None:
        meant, slipped = torch.log(reliability), torch.log1p(-reliability)
        right, wrong = torch.logaddexp(meant + right, slipped + wrong), torch.logaddexp(meant + wrong, slipped + right)
    return -(preference * right + (1.0 - preference) * wrong)


def centring_penalty(first: Tensor, second: Tensor) -> Tensor:
    """`(first + second)^2`, per pair of rewards [P]: keeps rewards around zero (arXiv 2312.09244, coefficient 0.01)."""
    return (first + second).square()


def pair_accuracy(chosen: Tensor, rejected: Tensor) -> Tensor:
    """1 where the chosen response has the higher reward, 1/2 for equal rewards, 0 otherwise; [P], float32.

    Equal rewards count half, so that a constant reward is at 50 % and not at 0.
    """
    return 0.5 * (1.0 + torch.sign(chosen.detach() - rejected.detach()).float())
