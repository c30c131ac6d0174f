"""Sources of reward. A new kind is a class with `name`, `weight`, `meter` and `score`, built in `build_sources`.

Invariant: a source returns one finite number, or a `RewardError`, for each rollout, in order.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from rlhf_ray.algorithms.registry import import_named
from rlhf_ray.config.reward import RewardConfig, RewardFunctionSource
from rlhf_ray.rewards.answers import RewardError, check_scores, response_texts
from rlhf_ray.rewards.http import ApiKeys, EventLoopThread, UsageMeter
from rlhf_ray.rewards.http_reward import HttpReward
from rlhf_ray.rewards.judge import JudgeReward
from rlhf_ray.rewards.model_reward import EnsembleScore, ModelReward
from rlhf_ray.types import Rollout

RewardFunction = Callable[..., Sequence[float]]
NARROWING_CALLS = 64
"""Most calls made to find the rollouts on which a function raises, after it raised on a batch."""


class RewardSource(Protocol):
    """One part of the reward."""

    name: str
    weight: float

    @property
    def meter(self) -> UsageMeter | None:
        """Usage of a service, whose `score` several threads may call at the same time. None: computed in this process."""

    def score(self, rollouts: Sequence[Rollout]) -> Sequence[float | EnsembleScore | RewardError]:
        """One finite number, or an error, for each rollout."""


class FunctionReward:
    """A Python function of prompts (messages), responses (text) and metadata."""

    meter: UsageMeter | None = None

    def __init__(self, source: RewardFunctionSource, tokenizer: PreTrainedTokenizerBase) -> None:
        self.name, self.weight = source.name, source.weight
        self.function = resolve_function(source.function)
        self.tokenizer = tokenizer

    def score(self, rollouts: Sequence[Rollout]) -> list[float | RewardError]:
        """Score a batch. If the function raises, call it again on halves, so that only the rollouts it raises on are lost.

        After `NARROWING_CALLS` calls, each part that still raises is lost as a whole.
        """
        calls_left = NARROWING_CALLS

        def score_part(part: Sequence[Rollout]) -> list[float | RewardError]:
            nonlocal calls_left
            try:
                return check_scores(self.name, self._call(part), part)
            except Exception as error:
                # A user's function may raise anything. The error names the rollouts of the call.
                if len(part) == 1 or calls_left < 2:
                    reason = f"raised {type(error).__name__}: {error}"
                    return [RewardError(self.name, reason, [r.id for r in part])] * len(part)
            calls_left -= 2
            middle = len(part) // 2
            return score_part(part[:middle]) + score_part(part[middle:])

        return score_part(rollouts)

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
        ValueError: the module cannot be imported, has no such function, or the function takes other parameters.
    """
    function = import_named(path, "reward function")
    if not callable(function):
        raise ValueError(f"reward function {path!r} is not a function but {type(function).__name__}")
    _check_signature(path, function)
    return function


def _check_signature(path: str, function: RewardFunction) -> None:
    expected = "def name(prompts, responses, metadata) -> list[float]"
    if inspect.iscoroutinefunction(function):
        raise ValueError(f"reward function {path!r} is async; expected a plain function: {expected}")
    try:
        signature = inspect.signature(function)
    except ValueError:
        return  # some functions written in C have no signature
    try:
        signature.bind(prompts=(), responses=(), metadata=())
    except TypeError as error:
        raise ValueError(
            f"reward function {path!r} has the parameters {signature} and is called with prompts, responses and metadata by "
            f"name ({error}); expected: {expected}"
        ) from error


def build_sources(
    config: RewardConfig,
    model_paths: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    keys: ApiKeys,
    folder: Path,
) -> list[RewardSource]:
    """The sources that a config names. The most expensive ones come last, and skip rollouts on which others failed.

    Args:
        model_paths: folders of the reward models: one, or the members of an ensemble.
        keys: API keys of the services.
        folder: the run folder, where sources keep their files.
    """
    sources: list[RewardSource] = [FunctionReward(source, tokenizer) for source in config.functions]
    if config.model is not None and model_paths:
        sources.insert(0, ModelReward(model_paths, config.model, config, device))
    if config.services:
        event_loop, workers = EventLoopThread(), config.workers.count
        sources += [HttpReward(source, tokenizer, keys, workers, event_loop) for source in config.http]
        sources += [JudgeReward(source, tokenizer, keys, workers, event_loop, folder) for source in config.judges]
    return sources
