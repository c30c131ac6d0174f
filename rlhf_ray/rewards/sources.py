"""Sources of reward. A further kind is a class with `name`, `weight` and `score`, built in `build_sources`.

Invariant: a source answers with one finite number per rollout, in order, or says with a `RewardError` which it has none for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from rlhf_ray.config.reward import RewardConfig, RewardFunctionSource
from rlhf_ray.rewards.answers import RewardError, checked, response_texts
from rlhf_ray.rewards.http import Background, Keys
from rlhf_ray.rewards.http_reward import HttpReward
from rlhf_ray.rewards.judge import JudgeReward
from rlhf_ray.rewards.model_reward import EnsembleScore, ModelReward
from rlhf_ray.types import Rollout

RewardFunction = Callable[..., Sequence[float]]
NARROWING_CALLS = 64
"""Calls of a function that raised on a batch, at most, to find out which rollouts it raises on."""


class RewardSource(Protocol):
    """One part of the reward."""

    name: str
    weight: float
    remote: bool
    """`score` waits for a service, and may be called from several threads at the same time."""

    def score(self, rollouts: Sequence[Rollout]) -> Sequence[float | EnsembleScore | RewardError]:
        """One finite number per rollout, or an error in its place."""


class FunctionReward:
    """A Python function of prompts (messages), responses (text) and metadata."""

    remote = False

    def __init__(self, source: RewardFunctionSource, tokenizer: PreTrainedTokenizerBase) -> None:
        self.name, self.weight = source.name, source.weight
        self.function = resolve_function(source.function)
        self.tokenizer = tokenizer

    def score(self, rollouts: Sequence[Rollout]) -> list[float | RewardError]:
        """Where the function raises, it is called again on halves, so that only the rollouts that it raises on are lost.

        After `NARROWING_CALLS` calls whatever it still raises on is lost as it is.
        """
        calls_left = NARROWING_CALLS

        def on(part: Sequence[Rollout]) -> list[float | RewardError]:
            nonlocal calls_left
            try:
                return checked(self.name, self._call(part), part)
            except Exception as error:
                # A user's function may raise anything; it is reported with the rollouts it was given.
                if len(part) == 1 or calls_left < 2:
                    reason = f"raised {type(error).__name__}: {error}"
                    return [RewardError(self.name, reason, [r.id for r in part])] * len(part)
            calls_left -= 2
            middle = len(part) // 2
            return on(part[:middle]) + on(part[middle:])

        return on(rollouts)

    def _call(self, rollouts: Sequence[Rollout]) -> np.ndarray:
        scores = self.function(
            prompts=[r.prompt.messages for r in rollouts],
            responses=response_texts(self.tokenizer, rollouts),
            metadata=[r.prompt.metadata for r in rollouts],
        )
        return np.asarray(scores, dtype=np.float64)


def resolve_function(path: str) -> RewardFunction:
    """The function that `package.module:function` names.

    Raises:
        ValueError: the module cannot be imported or has no such function.
    """
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"reward function {path!r}: cannot import {module_name!r}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"reward function {path!r}: module {module_name!r} has no function {name!r}")
    return function


def build_sources(
    config: RewardConfig,
    model_paths: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    keys: Keys,
    folder: Path,
) -> list[RewardSource]:
    """The sources that a config names; those that cost most come last, and are not asked about what others failed on.

    Args:
        model_paths: of reward models, an ensemble's or one.
        keys: of the services.
        folder: of the run, for what a source keeps.
    """
    sources: list[RewardSource] = [FunctionReward(source, tokenizer) for source in config.functions]
    if config.model is not None and model_paths:
        sources.insert(0, ModelReward(model_paths, config.model, config, device))
    if config.services:
        background, workers = Background(), config.workers.count
        sources += [HttpReward(source, tokenizer, keys, workers, background) for source in config.http]
        sources += [JudgeReward(source, tokenizer, keys, workers, background, folder) for source in config.judges]
    return sources
