"""What goes over the wire between pool and worker: requests without their conversations, responses without their
prompts.

A prompt's messages and metadata stay with the driver; they would otherwise be copied to the worker and back for
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlhf_ray.errors import InputError
from rlhf_ray.types import FinishReason, PolicyVersion, RolloutRequest


class PromptRefused(InputError, ValueError):
    """A prompt that no engine with this context can answer."""


class EngineFailed(RuntimeError):
    """The engine raised in a forward pass; its process is not to be used any more."""


class EngineBusy(RuntimeError):
    """Weights cannot change while sequences are being generated."""


class TornWeights(RuntimeError):
    """A weight update began and did not finish: the engine holds parts of two policies and answers nothing."""


class IncompleteWeights(RuntimeError):
    """A weight update ended without having sent every parameter."""


class NoWorkerLeft(InputError, RuntimeError):
    """No rollout worker can serve the requests that are waiting."""


@dataclass(frozen=True)
class SampleRequest:
    """One sequence to continue."""

    id: str
    """Unique within one call."""
    token_ids: np.ndarray
    """int32 [P], P ≥ 1."""
    seed: int
    """Of this request's own random generator, so that what shares its batch changes nothing."""

    @classmethod
    def of(cls, request: RolloutRequest) -> SampleRequest:
        """The part of a rollout's request that an engine needs."""
        return cls(request.id, request.prompt.token_ids, request.seed)


@dataclass(frozen=True)
class Sample:
    """What the engine answered. T tokens, the end-of-sequence token included."""

    id: str
    token_ids: np.ndarray
    """int32 [T]."""
    logprobs: np.ndarray
    """float32 [T], nats, after temperature."""
    versions: np.ndarray
    """int32 [T]."""
    finish_reason: FinishReason


@dataclass(frozen=True)
class WorkerInfo:
    """What a rollout worker is and where it runs."""

    pid: int
    node_id: str
    host: str
    device: str
    """`cpu` or the accelerator's name."""
    vllm: str
    """Version of vLLM."""
    torch: str
    """Version of torch."""
    threads: int
    """OpenMP threads of the engine."""
    vocabulary: int
    """Number of token ids that the model knows."""
    context: int
    """Most tokens of prompt and response together."""
    version: PolicyVersion | None
    """Policy version of its weights; None in the middle of an update."""


def check_prompt(request: SampleRequest, context: int, vocabulary: int) -> None:
    """Refuse a prompt that leaves no room for a token, or that would make the engine fail.

    Raises:
        PromptRefused: naming the request, what is wrong with it and what is allowed.
    """
    length = len(request.token_ids)
    if length == 0:
        raise PromptRefused(f"prompt of {request.id!r} is empty; a prompt needs at least one token")
    if length >= context:
        raise PromptRefused(
            f"prompt of {request.id!r} has {length} tokens; the context is {context} for prompt and response together, "
            f"so at most {context - 1} are allowed. Shorten or drop it, or raise rollout.max_sequence_tokens"
        )
    lowest, highest = int(request.token_ids.min()), int(request.token_ids.max())
    if lowest < 0 or highest >= vocabulary:
        raise PromptRefused(
            f"prompt of {request.id!r} has token ids from {lowest} to {highest}; the model knows 0 to {vocabulary - 1}. "
            "Was it tokenized by another tokenizer?"
        )
