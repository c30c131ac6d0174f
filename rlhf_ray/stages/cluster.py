"""The Ray cluster of a run: joined, or started on this machine and ended with the run."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import ray

import rlhf_ray
from rlhf_ray.config.run import ClusterConfig

JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets this variable for the driver of a submitted job."""


@contextmanager
def connect(config: ClusterConfig, run: str) -> Iterator[None]:
    """Connect to the configured cluster; Ray's log lines of the actors come along.

    Runs share a cluster without seeing each other's actors: each has a namespace of its name. A process that is connected already
    (a test) keeps its connection.
    """
    if ray.is_initialized():
        yield
        return
    if config.address is None:
        ray.init(address="local", include_dashboard=False, log_to_driver=False, runtime_env=local_runtime_env())
    else:
        # Nodes need the libraries; this package travels with the run, so that both sides have the same version. A submitted job
        # has it in its working directory.
        runtime_env = {} if JOB in os.environ else {"py_modules": [rlhf_ray]}
        ray.init(address=config.address, namespace=run, runtime_env=runtime_env)
    try:
        yield
    finally:
        ray.shutdown()


def local_runtime_env() -> dict[str, str]:
    """What worker processes on this machine need: Ray starts them by a shell and does not quote the interpreter's path."""
    quoted = shlex.quote(sys.executable)
    return {} if quoted == sys.executable else {"py_executable": quoted}
