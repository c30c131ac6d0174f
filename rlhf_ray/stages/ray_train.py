"""Ray Train as the supervised stages use it, and what its public API cannot do.

- A stop request cannot reach the ranks. The driver creates `SupervisedJob.stop_file`, and the ranks look for it after each step.
- Metrics cannot go through `ray.train.report`: it is a barrier over the ranks, and Ray Train takes one report of a rank per poll
  (0.5 s here), so each step would wait for a poll. The driver reads the metrics file of rank 0 as it grows.
- Ray Train's cleaner of placement groups cannot be turned off. It asks the dashboard whether the controller is alive; a private
  cluster has none, so it would wait 12 s at the end of each stage and log a traceback. `StageTrainer` leaves it out, by the name
  of its class. It is not needed: placement groups end with the run, which is a Ray job of its own.

Ray Train's controller loads this module before it starts the ranks, so the module imports nothing heavy of this package.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, get_context
from ray.train.torch import TorchConfig, TorchTrainer

if TYPE_CHECKING:
    from rlhf_ray.batch import Batch
    from rlhf_ray.stages.supervised_job import SupervisedJob

POLL_S = "0.5"
"""Seconds between two polls of the ranks by the controller. Ray's default of 2 s would delay the end of each stage."""
CLEANER = "PlacementGroupCleanerCallback"


def train_rank(arguments: dict[str, Any]) -> int:
    """Run one rank; returns its last optimizer step. The arguments are references, so the controller does not load them."""
    from rlhf_ray.stages.supervised_loop import run_rank

    job, train, held_out = ray.get([arguments["job"], arguments["train"], arguments["held_out"]])
    return run_rank(job, train, held_out, get_context().get_world_rank(), get_context().get_world_size())


class StageTrainer(TorchTrainer):
    """The trainer of one stage. `fit().return_value` is the last optimizer step."""

    def __init__(self, job: SupervisedJob, train: Batch, held_out: Batch, resources: dict[str, float]) -> None:
        """`resources`: what each rank asks for besides its CPUs and GPUs."""
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", POLL_S)
        if len(ray.nodes()) == 1:
            # A single node is not preempted without the driver, and the watcher is a process of its own.
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        workers = job.config.learner.workers
        own = {"CPU": workers.cpus, **({"GPU": workers.gpus} if workers.gpus else {})}
        environment = {**({} if workers.gpus else {"DS_ACCELERATOR": "cpu"}), **workers.process_environment}
        super().__init__(
            train_loop_per_worker=train_rank,
            train_loop_config={"job": ray.put(job), "train": ray.put(train), "held_out": ray.put(held_out)},
            torch_config=TorchConfig(backend="nccl" if workers.gpus else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=workers.count,
                use_gpu=workers.gpus > 0,
                resources_per_worker=own | workers.resources | resources,
            ),
            run_config=RunConfig(
                name=job.name,
                storage_path=str(job.folder.path / "ray_train"),
                worker_runtime_env={"env_vars": environment},
                failure_config=FailureConfig(max_failures=job.config.max_failures),
            ),
        )

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if type(callback).__name__ != CLEANER]
