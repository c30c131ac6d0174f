"""What Ray Train runs in each rank of a supervised stage.

In a module of its own, which imports next to nothing: Ray Train's controller, a process before all others, loads the function,
and the ranks start only when it is ready.
"""

from __future__ import annotations

from typing import Any


def train_rank(arguments: dict[str, Any]) -> None:
    """One rank, in a process of Ray Train's. All arguments are references, so that the controller reads none of them."""
    import ray
    from ray.train import get_context

    from rlhf_ray.stages.supervised_loop import run_rank

    job, train, held_out = ray.get([arguments["job"], arguments["train"], arguments["held_out"]])
    run_rank(job, train, held_out, get_context().get_world_rank(), get_context().get_world_size())
