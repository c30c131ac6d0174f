"""Distributed RLHF training on Ray: the command `rlhf-ray`, and a Python API (`rlhf_ray.api`) with the same objects."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_ray.api import LoadedRun, load_run, run
    from rlhf_ray.config import RunConfig, load_config

__version__ = "0.1.0"
__all__ = ["LoadedRun", "RunConfig", "__version__", "load_config", "load_run", "run"]

# torch, transformers and vLLM make a million objects that never die. With Python's own threshold of 700, the garbage collector
# takes 15 % of the CPU time in which the actors of a small run start.
gc.set_threshold(10_000, 10, 10)


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that `import rlhf_ray` and `rlhf-ray --help` stay fast."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rlhf_ray import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
