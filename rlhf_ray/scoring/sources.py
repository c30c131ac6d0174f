"""Sources of reward. A further kind is a class with `name`, `weight` and `score`, built in `build_sources`.

Invariant: a source answers with one finite number per rollout, in order, or raises `RewardError` naming itself and the rollouts.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from rlhf_ray.batch import Batch, pack_sequences, pad
from rlhf_ray.config.scoring import RewardConfig, RewardFunctionSource
from rlhf_ray.errors import InputError
from rlhf_ray.learner.planning import plan_micro_batches
from rlhf_ray.models.heads import SequenceScores
from rlhf_ray.models.loading import load_scalar_model
from rlhf_ray.models.reward_heads import normalisation
from rlhf_ray.types import Rollout

RewardFunction = Callable[..., Sequence[float]]


class RewardError(InputError, RuntimeError):
    """A source of reward failed on some rollouts."""

    def __init__(self, source: str, reason: str, rollout_ids: Sequence[str]) -> None:
        super().__init__(source, reason, tuple(rollout_ids))
        self.source, self.reason, self.rollout_ids = source, reason, tuple(rollout_ids)

    def __str__(self) -> str:
        shown = ", ".join(self.rollout_ids[:3]) + (", …" if len(self.rollout_ids) > 3 else "")
        return f"reward source {self.source!r}: {self.reason} (rollouts {shown})"


class RewardSource(Protocol):
    """One part of the reward."""

    name: str
    weight: float

    def score(self, rollouts: Sequence[Rollout]) -> np.ndarray:
        """float64 [n], finite."""


class ModelReward:
    """A sequence-classification model, read at the last token, normalised as its config says.

    Of a model of several annotator groups it is the consensus, or the group that `reward.model.group` names.
    """

    name = "model"

    def __init__(self, path: str, weight: float, config: RewardConfig, device: torch.device) -> None:
        group = config.model.group if config.model else None
        model = load_scalar_model(path, config.dtype, config.attention, reading=group).eval().to(device)
        self.weight, self.device, self.budget = weight, device, config.micro_batch_tokens
        self.mean, self.std = normalisation(model.config)
        self.scorer = SequenceScores(model)

    def score(self, rollouts: Sequence[Rollout]) -> np.ndarray:
        raw = score_sequences(self.scorer, sequences(rollouts), self.budget, self.device)
        return _checked(self.name, (raw - self.mean) / self.std, rollouts)


class FunctionReward:
    """A Python function of prompts (messages), responses (text) and metadata."""

    def __init__(self, source: RewardFunctionSource, tokenizer: PreTrainedTokenizerBase) -> None:
        self.name, self.weight = source.name, source.weight
        self.function = resolve_function(source.function)
        self.tokenizer = tokenizer

    def score(self, rollouts: Sequence[Rollout]) -> np.ndarray:
        responses = self.tokenizer.batch_decode([r.token_ids for r in rollouts], skip_special_tokens=True)
        try:
            scores = self.function(
                prompts=[r.prompt.messages for r in rollouts],
                responses=[text.strip() for text in responses],
                metadata=[r.prompt.metadata for r in rollouts],
            )
            result = np.asarray(scores, dtype=np.float64)
        except Exception as error:
            # A user's function may raise anything; it is reported with the rollouts it was given.
            raise RewardError(self.name, f"raised {type(error).__name__}: {error}", [r.id for r in rollouts]) from error
        return _checked(self.name, result, rollouts)


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
    config: RewardConfig, model_path: str | None, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> list[RewardSource]:
    """The sources that a config names."""
    sources: list[RewardSource] = [FunctionReward(source, tokenizer) for source in config.functions]
    if config.model is not None and model_path is not None:
        sources.insert(0, ModelReward(model_path, config.model.weight, config, device))
    return sources


def sequences(rollouts: Sequence[Rollout]) -> Batch:
    """Prompt and response of each rollout; the response is the target."""
    return pack_sequences(
        [np.concatenate([r.prompt.token_ids, r.token_ids]) for r in rollouts],
        [np.arange(len(r.prompt.token_ids) + len(r)) >= len(r.prompt.token_ids) for r in rollouts],
    )


@torch.inference_mode()
def score_sequences(scorer: SequenceScores, batch: Batch, token_budget: int, device: torch.device) -> np.ndarray:
    """float64 [B]: raw scores of a head of one row, computed in micro-batches of similar lengths."""
    scores = np.empty(len(batch))
    for indices in plan_micro_batches(batch.lengths, 1, token_budget).micro_batches[0]:
        scores[indices] = scorer(pad(batch.select(indices), device))[:, 0].cpu().numpy()
    return scores


def _checked(name: str, scores: np.ndarray, rollouts: Sequence[Rollout]) -> np.ndarray:
    if scores.shape != (len(rollouts),):
        reason = f"returned shape {scores.shape} for {len(rollouts)} responses; one number for each is needed"
        raise RewardError(name, reason, [r.id for r in rollouts])
    bad = ~np.isfinite(scores)
    if bad.any():
        reason = f"returned {scores[bad][0]} for {int(bad.sum())} of {len(rollouts)} responses; scores must be finite"
        raise RewardError(name, reason, [r.id for r, b in zip(rollouts, bad, strict=True) if b])
    return scores
