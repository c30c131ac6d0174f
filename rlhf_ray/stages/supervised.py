"""SFT and reward models on Ray Train, from the driver's side: start the ranks, show progress, pass on a stop request.

Invariant: the model's folder appears when the stage is complete and not before, so its presence means that the stage is done.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import ray

from rlhf_ray.batch import Batch
from rlhf_ray.config.loading import ConfigError
from rlhf_ray.runs.storage.location import is_uri, portable
from rlhf_ray.runs.tail import Tail
from rlhf_ray.runtime.stopping import RunStopped, StopRequest
from rlhf_ray.stages.supervised_job import FitState, SupervisedJob
from rlhf_ray.telemetry.progress import StageProgress
from rlhf_ray.telemetry.wandb_log import WandbLog

POLL_S = 0.5
"""Seconds between two looks at the metrics file and the stop request."""


def run_supervised(job: SupervisedJob, train: Batch, held_out: Batch, stop: StopRequest | None = None) -> FitState:
    """Train on Ray Train, show progress, and leave the model in the stage's folder; returns how training ended.

    An interrupted stage continues from its newest checkpoint, and so does one whose workers died. A complete stage is not
    repeated.

    Raises:
        RunStopped: `stop` was requested; the steps so far are in a checkpoint.
    """
    if (complete := job.result()) is not None:
        return complete
    from rlhf_ray.stages.ray_train import StageTrainer

    trainer = StageTrainer(job, train, held_out, _driver_node(job) if is_uri(portable(job.folder.path)) else {})
    job.stop_file.unlink(missing_ok=True)
    with (
        ThreadPoolExecutor(1) as executor,
        StageProgress(job.folder.name, job.name, job.steps(train)) as progress,
        WandbLog(job.wandb, job.folder, job.name) as wandb,
    ):
        metrics = _MetricsFollower(job, progress, wandb)
        running = executor.submit(trainer.fit)
        while not running.done():
            wait([running], POLL_S)
            if stop is not None and stop.made:
                job.checkpoints.mkdir(parents=True, exist_ok=True)
                job.stop_file.touch()
            metrics.show_new()
        last_step = running.result().return_value
        metrics.show_new()
        if (complete := job.result()) is None:
            raise RunStopped(f"the run was asked to stop, and stopped after step {last_step} of {job.name}")
    return complete


class _MetricsFollower:
    """Shows what rank 0 writes to the metrics file of a stage. No line is read twice."""

    def __init__(self, job: SupervisedJob, progress: StageProgress, wandb: WandbLog) -> None:
        self.progress, self.wandb = progress, wandb
        self.records: list[dict[str, Any]] = []
        # A rank that restarts from a checkpoint drops the records after it, so the file is read from its start again.
        self.tail = Tail(job.folder.stage_metrics(job.name), self.records.append, self.records.clear)

    def show_new(self) -> None:
        """Show the newest step, and send all new steps to Weights & Biases."""
        self.tail.read_new()
        if not self.records:
            return
        self.wandb.follow(self.records)
        latest = {key: value for record in self.records for key, value in record.items() if value is not None}
        self.records.clear()
        if (step := int(latest.pop("step"))) >= self.progress.step:
            self.progress.update(step, latest)


def _driver_node(job: SupervisedJob) -> dict[str, float]:
    """The resource that places all ranks on the driver's node: in a run on a store they share its working folder.

    Raises:
        ConfigError: the node is too small.
    """
    workers = job.config.learner.workers
    me = ray.get_runtime_context().get_node_id()
    here = next(node for node in ray.nodes() if node["NodeID"] == me)
    for name, each in (("CPU", workers.cpus), ("GPU", workers.gpus)):
        if each * workers.count > here["Resources"].get(name, 0.0):
            raise ConfigError(
                f"{job.kind}.learner.workers: {workers.count} workers with {each:g} {name} each do not fit on the driver's node, "
                f"which has {here['Resources'].get(name, 0.0):g}. With folder on a store, the workers of this stage share the "
                "driver's working folder: start the run on a larger node, or set folder to a path that all nodes see"
            )
    return {f"node:{here['NodeManagerAddress']}": 0.001}
