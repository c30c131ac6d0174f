"""The Ray cluster of a run: joined, or started on this machine and ended with the run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from rlhf_ray.config.run import ClusterConfig


@contextmanager
def connect(config: ClusterConfig) -> Iterator[None]:
    """Connect to the configured cluster; Ray's log lines of the actors come along.

    A process that is connected already (a job on a cluster, a test) keeps its connection.
    """
    if ray.is_initialized():
        yield
        return
    # Ray's worker processes must find this package where it is not installed (a checkout).
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_DEDUP_LOGS", "1")
    if config.address is None:
        # Bundles are bookkeeping: a laptop's two cores hold all five roles.
        ray.init(address="local", include_dashboard=False, log_to_driver=False)
    else:
        ray.init(address=config.address)
    try:
        yield
    finally:
        ray.shutdown()
