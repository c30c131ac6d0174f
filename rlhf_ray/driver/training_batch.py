"""From scored rollouts to a training batch: rewards, advantages, weights. Pure functions over the global batch.

All of this is a few floats per token, so the driver computes it in one place: whitening, group statistics and the aggregation
of the loss are global without communication between ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from rlhf_ray.algorithms.advantages import EstimatorInput, whiten
from rlhf_ray.algorithms.distillation import per_token_advantages
from rlhf_ray.algorithms.kl import sequence_kl
from rlhf_ray.algorithms.rewards import score_unfinished, soft_overlong_punishment, token_rewards
from rlhf_ray.algorithms.token_weights import token_weights
from rlhf_ray.batch import Batch, pack_rollouts, to_rows
from rlhf_ray.config.algorithm import AlgorithmConfig
from rlhf_ray.types import Experience, Rollout


@dataclass(frozen=True)
class TrainingBatch:
    """A batch with advantages, and figures of it for the metrics."""

    batch: Batch
    kl: float | None
    """Mean over sequences of token-summed k1 against the reference, nats."""
    shaped_reward: float
    """Mean over sequences of score − β·KL."""
    trained: np.ndarray
    """bool [B]: sequences whose tokens are in the loss."""
    teacher_kl: float | None = None
    """Mean over tokens of log π_old − log π_T, nats."""

    def untrained(self) -> TrainingBatch:
        """The same batch with no sequence in the loss."""
        return replace(self, trained=np.zeros_like(self.trained))


def collate(experiences: Sequence[Experience]) -> Batch:
    """Pack token ids, rollout log-probabilities and, if there is a reference, its log-probabilities."""
    rollouts = [experience.rollout for experience in experiences]
    batch = pack_rollouts(rollouts).with_columns(
        rollout_logprobs=np.concatenate([r.logprobs[r.sampled_mask] for r in rollouts])
    )
    if experiences[0].reference_logprobs is None:
        return batch
    return batch.with_columns(reference_logprobs=_known([e.reference_logprobs for e in experiences]))


def prepare(
    experiences: Sequence[Experience],
    batch: Batch,
    algorithm: AlgorithmConfig,
    beta: float,
    max_new_tokens: int,
    teaching: float = 0.0,
) -> TrainingBatch:
    """Add advantages (and returns) to a collated batch.

    Without `batch.old_logprobs` (a single optimizer step and no KL in the reward) the rollout log-probabilities are used for
    the KL, which is then only reported.

    Args:
        beta: the KL coefficient.
        max_new_tokens: most tokens that the policy samples in one rollout.
        teaching: coefficient of the teacher's advantages, which are added to those of the reward; 0: no teacher.
    """
    counts = batch.target_counts
    logprobs = batch.rollout_logprobs if batch.old_logprobs is None else batch.old_logprobs
    assert logprobs is not None
    rows, mask = _rows(logprobs, counts)
    reference = None if batch.reference_logprobs is None else _rows(batch.reference_logprobs, counts)[0]
    scores = shaped_scores(experiences, algorithm, max_new_tokens)
    in_reward = beta if algorithm.kl.placement == "reward" else 0.0
    turn_parts, _ = _rows(turn_rewards([e.rollout for e in experiences]), counts)
    final = scores - turn_parts.sum(dim=1)
    rewards = turn_parts + token_rewards(final, rows, reference, mask, in_reward, algorithm.kl.used_estimator)
    shaped = float(rewards.sum(dim=1).mean())
    if algorithm.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    values = None if batch.old_values is None else _rows(batch.old_values, counts)[0]
    result = algorithm.estimator.compute(
        EstimatorInput(rewards, mask, scores, _group_ids(experiences), values, algorithm.gamma, algorithm.lam)
    )
    advantages = result.advantages
    if algorithm.estimator.whitens and algorithm.whiten_advantages:
        advantages = whiten(advantages, mask)
    teacher_kl = None
    if teaching:
        teacher = _rows(_known([e.teacher_logprobs for e in experiences]), counts)[0]
        teacher_advantages = per_token_advantages(teacher, rows, mask)
        advantages = advantages + teaching * teacher_advantages
        teacher_kl = float(-teacher_advantages[mask].mean())
    batch = batch.with_columns(advantages=_flat(advantages, mask))
    if result.returns is not None:
        batch = batch.with_columns(returns=_flat(result.returns, mask))
    kl = None if reference is None else float(sequence_kl(rows, reference, mask).mean())
    return TrainingBatch(batch, kl, shaped, _finished(experiences) | (not algorithm.filter_truncated), teacher_kl)


def minibatches(
    training_batch: TrainingBatch,
    algorithm: AlgorithmConfig,
    count: int,
    epochs: int,
    max_new_tokens: int,
    seed: Sequence[int],
) -> list[Batch | None]:
    """Cut `epochs`·`count` minibatches of whole sequences, each with the token weights of its own global loss.

    A minibatch without a trained sequence is None: its optimizer step would change the weights by momentum alone.
    """
    generator = np.random.default_rng(seed)
    batch = training_batch.batch
    result: list[Batch | None] = []
    for _ in range(epochs):
        order = generator.permutation(len(batch)) if count > 1 else np.arange(len(batch))
        result += [
            _weighted(batch.select(indices), training_batch.trained[indices], algorithm, max_new_tokens)
            for indices in np.array_split(order, count)
        ]
    return result


def shaped_scores(experiences: Sequence[Experience], algorithm: AlgorithmConfig, max_new_tokens: int) -> torch.Tensor:
    """float32 [B]: scores minus the penalties for truncated and long responses. Advantages are computed from these."""
    scores = torch.tensor([e.score.total for e in experiences], dtype=torch.float32)
    finished = torch.from_numpy(_finished(experiences))
    scores = score_unfinished(scores, finished, penalty=algorithm.missing_eos_penalty or 0.0)
    if (overlong := algorithm.overlong) is not None:
        lengths = torch.tensor([e.rollout.sampled_count for e in experiences])
        scores += soft_overlong_punishment(lengths, max_new_tokens, overlong.buffer_tokens, overlong.penalty)
    return scores


def turn_rewards(rollouts: Sequence[Rollout]) -> np.ndarray:
    """float32 [M]: the environment's reward of each turn at the turn's last token, 0 at other tokens."""
    column = np.zeros(sum(rollout.sampled_count for rollout in rollouts), dtype=np.float32)
    end = 0
    for rollout in rollouts:
        for turn in rollout.turns:
            end += turn.stop - turn.start
            column[end - 1] = turn.reward
        end += 0 if rollout.turns else len(rollout)
    return column


def _weighted(part: Batch, trained: np.ndarray, algorithm: AlgorithmConfig, max_new_tokens: int) -> Batch | None:
    if not trained.any():
        return None
    counts = part.target_counts
    rows, mask = _rows(np.repeat(trained, counts), counts)
    return part.with_columns(weights=_flat(token_weights(algorithm.aggregation, rows, max_new_tokens), mask))


def _finished(experiences: Sequence[Experience]) -> np.ndarray:
    return np.asarray([e.rollout.finish_reason == "stop" for e in experiences])


def _group_ids(experiences: Sequence[Experience]) -> torch.Tensor:
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(e.rollout.prompt.id, len(numbers)) for e in experiences])


def _known(columns: Sequence[np.ndarray | None]) -> np.ndarray:
    """One column of parts that all exist."""
    return np.concatenate([column for column in columns if column is not None])


def _rows(column: np.ndarray, counts: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    rows, mask = to_rows(column, counts)
    return torch.from_numpy(rows), torch.from_numpy(mask)


def _flat(rows: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    return rows[mask].float().numpy()
