"""From scored rollouts to a training batch: rewards, advantages, weights. Pure, and over the global batch.

Everything here is a few floats per token, so it is computed in one place; that makes whitening, group statistics and the
aggregation of the loss global by construction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rlhf_ray.algorithms.advantages import whiten
from rlhf_ray.algorithms.aggregation import token_weights
from rlhf_ray.algorithms.estimators import EstimatorInput, estimator_named
from rlhf_ray.algorithms.kl import sequence_kl
from rlhf_ray.algorithms.rewards import score_unfinished, token_rewards
from rlhf_ray.batch import Batch, to_rows
from rlhf_ray.config.algorithm import AlgorithmConfig
from rlhf_ray.scoring.sources import sequences
from rlhf_ray.types import Experience


@dataclass(frozen=True)
class Prepared:
    """A batch ready for the learners and what the metrics say of it."""

    batch: Batch
    kl: float | None
    """Mean over sequences of token-summed k1 against the reference, nats."""
    shaped_reward: float
    """Mean over sequences of score − β·KL."""


def collate(experiences: Sequence[Experience]) -> Batch:
    """Token ids and the columns that rollouts bring along."""
    rollouts = [experience.rollout for experience in experiences]
    batch = sequences(rollouts).with_columns(behaviour_logprobs=np.concatenate([r.logprobs for r in rollouts]))
    if experiences[0].reference_logprobs is None:
        return batch
    return batch.with_columns(reference_logprobs=np.concatenate([e.reference_logprobs for e in experiences]))


def prepare(experiences: Sequence[Experience], batch: Batch, algorithm: AlgorithmConfig, beta: float) -> Prepared:
    """Add advantages (and returns) to a collated batch.

    `batch.old_logprobs` and `batch.old_values` are read where they are set; without old log-probabilities (a single
    minibatch, and no KL in the reward) the engine's stand in for the KL that is only reported.
    """
    counts = batch.target_counts
    rows, mask = _rows(batch.behaviour_logprobs if batch.old_logprobs is None else batch.old_logprobs, counts)
    reference = None if batch.reference_logprobs is None else _rows(batch.reference_logprobs, counts)[0]
    scores = _scores(experiences, algorithm)
    in_reward = beta if algorithm.kl.placement == "reward" else 0.0
    rewards = token_rewards(scores, rows, reference, mask, in_reward)
    shaped = float(rewards.sum(dim=1).mean())
    if algorithm.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    values = None if batch.old_values is None else _rows(batch.old_values, counts)[0]
    groups = _group_ids(experiences)
    result = estimator_named(algorithm.advantage).compute(
        EstimatorInput(rewards, mask, groups, values, algorithm.gamma, algorithm.lam)
    )
    advantages = result.advantages
    if algorithm.advantage == "gae" and algorithm.whiten_advantages:
        advantages = whiten(advantages, mask)
    batch = batch.with_columns(advantages=_flat(advantages, mask))
    if result.returns is not None:
        batch = batch.with_columns(returns=_flat(result.returns, mask))
    kl = None if reference is None else float(sequence_kl(rows, reference, mask).mean())
    return Prepared(batch, kl, shaped)


def minibatches(
    batch: Batch, algorithm: AlgorithmConfig, count: int, epochs: int, max_new_tokens: int, seed: Sequence[int]
) -> list[Batch]:
    """`epochs`·`count` minibatches of whole sequences, each with the weights of its own global loss."""
    generator = np.random.default_rng(seed)
    result = []
    for _ in range(epochs):
        order = generator.permutation(len(batch)) if count > 1 else np.arange(len(batch))
        for indices in np.array_split(order, count):
            part = batch.select(indices)
            mask = torch.from_numpy(to_rows(np.ones(int(part.target_mask.sum())), part.target_counts)[1])
            weights = token_weights(algorithm.aggregation, mask, max_new_tokens)
            result.append(part.with_columns(weights=_flat(weights, mask)))
    return result


def _scores(experiences: Sequence[Experience], algorithm: AlgorithmConfig) -> torch.Tensor:
    scores = torch.tensor([e.score.total for e in experiences], dtype=torch.float32)
    finished = torch.tensor([e.rollout.finish_reason == "stop" for e in experiences])
    return score_unfinished(scores, finished, penalty=algorithm.missing_eos_penalty or 0.0)


def _group_ids(experiences: Sequence[Experience]) -> torch.Tensor:
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(e.rollout.prompt.id, len(numbers)) for e in experiences])


def _rows(column: np.ndarray, counts: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    rows, mask = to_rows(column, counts)
    return torch.from_numpy(rows), torch.from_numpy(mask)


def _flat(rows: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    return rows[mask].float().numpy()
