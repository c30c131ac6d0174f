"""Before the first step of PPO: the reward of this run's reward model gets mean 0 and std 1 on the policy's own answers.

Invariants: it happens once in a run, before anything is learned from the reward, and is written into the reward model's
`config.json`, so that a resumed run, and whoever uses the folder later, counts as this run did.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlhf_ray.config.reward import RewardModelSource
from rlhf_ray.driver.workers import Roles
from rlhf_ray.models.reward_heads import SMALLEST_STD, normalised_on, renormalise
from rlhf_ray.types import Prompt, RolloutRequest, rollout_seed


def due(source: RewardModelSource | None, members: Sequence[Path]) -> bool:
    """Whether a run's own reward model, with these folders, is still as its training left it, and should not be."""
    if source is None or source.paths or not source.normalise_on:
        return False
    return any(normalised_on(member, source.group) is None for member in members)


async def normalise_reward(
    source: RewardModelSource, members: Sequence[Path], roles: Roles, prompts: Sequence[Prompt]
) -> list[tuple[float, float]]:
    """Answer prompts with the policy that the rollout workers have, and count rewards by these answers from now on.

    Algorithms 1.12: mean from "The N+ Implementation Details of RLHF" (arXiv 2403.17031), std from the code of Ziegler et al.
    (arXiv 1909.08593), both on samples of the reference policy.

    Returns:
        Mean and std of each member's raw reward.
    """
    requests = [RolloutRequest(prompt, 0, rollout_seed("normalisation", prompt.id, 0)) for prompt in prompts]
    rewards = await roles.raw_rewards(await roles.rollouts(requests))
    statistics = [(float(row.mean()), float(max(row.std(), SMALLEST_STD))) for row in rewards]
    for member, (mean, std) in zip(members, statistics, strict=True):
        renormalise(member, source.group, mean, std, f"{len(prompts)} answers of the policy that PPO started from")
    await roles.reward.ask_all("normalise", statistics)
    return statistics
