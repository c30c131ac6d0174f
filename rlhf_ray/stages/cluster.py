"""The Ray cluster of a run: joined, or started on this machine and ended with the run."""

from __future__ import annotations

import shlex
import sys
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
        ray.init(address="local", include_dashboard=False, log_to_driver=False, runtime_env=local_runtime_env())
    else:
        # Nodes need the libraries; this package travels with the run, so that both sides have the same version.
        ray.init(address=config.address, runtime_env={"py_modules": [rlhf_ray]})
    try:
        yield
    finally:
        ray.shutdown()


def local_runtime_env() -> dict[str, str]:
    """What worker processes on this machine need: Ray starts them by a shell and does not quote the interpreter's path."""
    quoted = shlex.quote(sys.executable)
    return {} if quoted == sys.executable else {"py_executable": quoted}
