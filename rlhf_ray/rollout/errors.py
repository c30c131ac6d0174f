"""What can go wrong in generation, by what is to be done about it.

`PromptRefused` is the data's fault and is never retried; `EngineFailed` is the worker's and is retried elsewhere; the
others are the caller's. Kept apart from the engine so that a driver can name them without loading vLLM.
"""

from __future__ import annotations

from rlhf_ray.errors import InputError


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
