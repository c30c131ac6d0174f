"""Compares the base, SFT and PPO policies on held-out prompts.

Invariant: all policies answer the same prompts, with the same seeds, on the same engines. The utility, where there is one, is
the true quality of an answer, which training never sees.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_ray.algorithms.statistics import win_rate
from rlhf_ray.data.records import Pair
from rlhf_ray.data.simulator import pair_accuracy_ceiling
from rlhf_ray.driver.answers import Answers, answer
from rlhf_ray.driver.workers import Roles
from rlhf_ray.runs.events import read_events
from rlhf_ray.runs.metrics import read_metrics
from rlhf_ray.runs.run_folder import RunFolder, atomic_write
from rlhf_ray.runs.storage.location import portable
from rlhf_ray.telemetry.progress import StageProgress
from rlhf_ray.types import Prompt


async def answer_with_each(
    roles: Roles,
    policies: Mapping[str, str],
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    utility: str | None,
    run: str,
) -> dict[str, Answers]:
    """Load each policy (name to model folder) into the rollout workers, and let it answer the prompts.

    Raises:
        RewardError, EnvironmentFailed: as `answer`.
    """
    answers = {}
    with StageProgress(run, "evaluation", len(policies), plain_every=1) as progress:
        for number, (name, path) in enumerate(policies.items(), start=1):
            await roles.pool.load_folder(portable(path), -number)
            answers[name] = await answer(roles, prompts, tokenizer, utility)
            progress.update(number)
    return answers


def summarise(
    answers: Mapping[str, Answers],
    reward_model_accuracy: float | None,
    ceiling: float | None,
    seconds: Mapping[str, float],
) -> dict:
    """The content of `evaluation.json`. Unknown figures are None."""
    sft, ppo = answers.get("sft"), answers.get("ppo")
    known = {name: a.utilities for name, a in answers.items() if a.utilities is not None}
    won = by_reward = None
    if sft is not None and ppo is not None:
        by_reward = win_rate(ppo.rewards, sft.rewards)
        if ppo.utilities is not None and sft.utilities is not None:
            won = win_rate(ppo.utilities, sft.utilities)
    return {
        "win_rate_vs_sft": won and won.value,
        "win_rate_interval": won and (won.low, won.high),
        "win_rate_vs_sft_by_reward": by_reward and by_reward.value,
        "utility": {name: float(known[name].mean()) if name in known else None for name in ("base", "sft", "ppo")},
        "utility_std_sft": float(known["sft"].std()) if "sft" in known else None,
        "reward": {name: _mean_of_known(a.rewards) for name, a in answers.items()},
        "length": {name: float(a.lengths.mean()) for name, a in answers.items()},
        "kl_sequence": ppo.kl if ppo else None,
        "reward_model_accuracy": reward_model_accuracy,
        "reward_model_accuracy_ceiling": ceiling,
        "prompts": len(next(iter(answers.values())).texts),
        "seconds": dict(seconds),
    }


def _mean_of_known(values: np.ndarray) -> float | None:
    """The mean without NaN; None if there is nothing else, because JSON has no NaN."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def accuracy_of_reward_model(
    folder: RunFolder, held_out_pairs: Sequence[Pair] | None
) -> tuple[float | None, float | None]:
    """The accuracy on held-out pairs, and the highest accuracy that the annotators' noise allows; None where unknown."""
    path = folder.stage_metrics("reward_model")
    measured = [
        record["heldout/accuracy"] for record in read_metrics(path) if record.get("heldout/accuracy") is not None
    ]
    ceiling = pair_accuracy_ceiling(held_out_pairs) if held_out_pairs is not None else None
    return (measured[-1] if measured else None), ceiling


def write_results(
    folder: RunFolder, prompts: Sequence[Prompt], answers: Mapping[str, Answers], held_out_pairs: Sequence[Pair] | None
) -> None:
    """Write the answers and `evaluation.json`."""
    # Stages of earlier attempts count, too.
    stages = [e for e in read_events(folder.events) if e.kind == "stage" and "seconds" in e.fields]
    seconds = {event.message.removesuffix(" ends"): event.fields["seconds"] for event in stages}
    accuracy, ceiling = accuracy_of_reward_model(folder, held_out_pairs)
    summary = summarise(answers, accuracy, ceiling, seconds)
    write_samples(folder.evaluation_samples, prompts, answers)
    atomic_write(folder.evaluation, json.dumps(summary, indent=1) + "\n")


def write_samples(path: Path, prompts: Sequence[Prompt], answers: Mapping[str, Answers]) -> None:
    """Write one JSON object per prompt with all policies' answers, rewards and utilities."""
    lines = []
    for i, prompt in enumerate(prompts):
        utilities = {name: float(a.utilities[i]) for name, a in answers.items() if a.utilities is not None}
        line = {
            "prompt": list(prompt.messages),
            "answers": {name: a.texts[i] for name, a in answers.items()},
            "rewards": {name: None if math.isnan(a.rewards[i]) else float(a.rewards[i]) for name, a in answers.items()},
            "utility": utilities or None,
        }
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    atomic_write(path, "".join(lines))
