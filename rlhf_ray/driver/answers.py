"""Answers of one policy to a set of prompts, scored: what evaluation and endpoint publishing compare policies by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_ray.config.reward import RewardFunctionSource
from rlhf_ray.config.run import RunConfig
from rlhf_ray.data.datasets import SIMULATED_UTILITY
from rlhf_ray.driver.workers import Roles
from rlhf_ray.rewards.answers import RewardError, scores_or_raise
from rlhf_ray.rewards.sources import FunctionReward
from rlhf_ray.types import Prompt, Rollout, RolloutRequest, rollout_seed


@dataclass(frozen=True)
class Answers:
    """One policy's answers to all prompts, in the order of the prompts."""

    texts: tuple[str, ...]
    lengths: np.ndarray
    """int64 [P], tokens."""
    rewards: np.ndarray
    """float64 [P], the run's reward; NaN where a source failed or the run has no reward."""
    utilities: np.ndarray | None
    """float64 [P]; None if the run has no utility."""
    kl: float | None
    """Mean over prompts of log π(answer) − log π_ref(answer), nats."""


def utility_of(config: RunConfig) -> str | None:
    """The function that computes the true quality of an answer; None if there is none."""
    return config.evaluation.utility or (SIMULATED_UTILITY if config.data.simulate else None)


async def answer(
    roles: Roles, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, utility: str | None
) -> Answers:
    """Sample one answer to each prompt from the policy that the rollout workers hold, and score the answers.

    Raises:
        RewardError, EnvironmentFailed: the utility or an environment failed, so the policies cannot be compared. (An answer
            whose reward failed has the reward NaN.)
    """
    requests = [RolloutRequest(prompt, 0, rollout_seed("evaluation", prompt.id, 0)) for prompt in prompts]
    rollouts = await roles.rollouts(requests)
    scores, references = await roles.score_all(rollouts)
    texts = [t.strip() for t in tokenizer.batch_decode([r.token_ids for r in rollouts], skip_special_tokens=True)]
    truth = None
    if utility is not None:
        source = FunctionReward(RewardFunctionSource(name="utility", function=utility), tokenizer)
        truth = scores_or_raise(source.score([rollout.final_turn for rollout in rollouts]))
    known = [reference for reference in references if reference is not None]
    kl = _mean_kl(rollouts, known) if known else None
    rewards = np.asarray([math.nan if isinstance(s, RewardError) or not s.parts else s.total for s in scores])
    return Answers(tuple(texts), np.asarray([r.sampled_count for r in rollouts]), rewards, truth, kl)


def _mean_kl(rollouts: Sequence[Rollout], references: Sequence[np.ndarray]) -> float:
    pairs = zip(rollouts, references, strict=True)
    return float(np.mean([float((r.logprobs[r.sampled_mask] - ref).sum()) for r, ref in pairs]))
