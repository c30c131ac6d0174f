"""What travels between the pool and its workers, and the errors of generation.

A prompt's messages and metadata stay with the driver, and a response travels without its prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlhf_ray.errors import InputError
from rlhf_ray.types import FinishReason, RolloutRequest


class PromptRefused(InputError, ValueError):
    """A prompt that no engine with this context can answer."""


class EngineFailed(RuntimeError):
    """The engine raised in a forward pass; its process must not be used any more."""


class EngineBusy(RuntimeError):
    """Weights cannot change while sequences are being generated."""


class TornWeights(RuntimeError):
    """A weight update began and did not finish: the engine holds parts of two policies and refuses to compute."""


class IncompleteWeights(RuntimeError):
    """A weight update ended without having sent every parameter."""


class NoWorkerLeft(InputError, RuntimeError):
    """No rollout worker can serve the waiting requests."""


@dataclass(frozen=True)
class EngineRequest:
    """One sequence to continue."""

    id: str
    """Unique within one call."""
    token_ids: np.ndarray
    """int32 [P], P ≥ 1."""
    seed: int
    """Seed of this request's own random generator, so the other sequences of a batch do not change its result."""

    @classmethod
    def of(cls, request: RolloutRequest) -> EngineRequest:
        """The part of a rollout request that an engine needs."""
        return cls(request.id, request.prompt.token_ids, request.seed)


@dataclass(frozen=True)
class EngineOutput:
    """The engine's answer to a request: T tokens, including the end-of-sequence token."""

    id: str
    token_ids: np.ndarray
    """int32 [T]."""
    logprobs: np.ndarray
    """float32 [T], nats, after temperature."""
    versions: np.ndarray
    """int32 [T]: the policy version that sampled each token."""
    finish_reason: FinishReason


@dataclass(frozen=True)
class WorkerInfo:
    """A rollout worker's process and model."""

    pid: int
    host: str
    vocabulary: int
    """Number of token ids that the model knows."""


def check_prompt(id: str, token_ids: np.ndarray, context: int, vocabulary: int) -> None:
    """Refuse a prompt that leaves no room for a response, or that would make the engine fail.

    Args:
        id: what the error message calls the prompt.
        token_ids: int32 [P].
        context: maximum number of tokens of prompt and response together.
        vocabulary: number of token ids that the model knows.

    Raises:
        PromptRefused: the prompt is empty, too long, or has token ids that the model does not know.
    """
    length = len(token_ids)
    if length == 0:
        raise PromptRefused(f"prompt of {id!r} is empty; a prompt needs at least one token")
    if length >= context:
        raise PromptRefused(
            f"prompt of {id!r} has {length} tokens; the context is {context} for prompt and response together, "
            f"so at most {context - 1} are allowed. Shorten or drop it, or raise rollout.max_sequence_tokens"
        )
    lowest, highest = int(token_ids.min()), int(token_ids.max())
    if lowest < 0 or highest >= vocabulary:
        raise PromptRefused(
            f"prompt of {id!r} has token ids from {lowest} to {highest}; the model knows 0 to {vocabulary - 1}. "
            "Was it tokenized by another tokenizer?"
        )
