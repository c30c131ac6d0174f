"""The Ray cluster of a run: joined, or started on this machine and ended with the run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import ray

import rlhf_ray
from rlhf_ray.config.run import ClusterConfig


@contextmanager
def connect(config: ClusterConfig) -> Iterator[None]:
    """Connect to the configured cluster; Ray's log lines of the actors come along.

    A process that is connected already (a job on a cluster, a test) keeps its connection.
    """
    if ray.is_initialized():
        yield
        return
    if config.address is None:
        ray.init(address="local", include_dashboard=False, log_to_driver=False)
    else:
        # Nodes need the libraries; this package travels with the run, so that both sides have the same version.
        ray.init(address=config.address, runtime_env={"py_modules": [rlhf_ray]})
    try:
        yield
    finally:
        ray.shutdown()
