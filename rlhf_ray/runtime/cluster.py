"""The Ray cluster of a run: joined, or started on this machine and ended with the run."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import AuthenticationError, RpcError

import rlhf_ray
from rlhf_ray.config.run import ClusterConfig
from rlhf_ray.errors import InputError
from rlhf_ray.runtime.addresses import (
    AUTO,
    CLUSTER_ALLOWED,
    RAY_ADDRESS,
    AddressRefused,
    check_answers,
    check_this_machine,
    host_and_port,
    is_url,
    unset,
)

JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets this variable for the driver of a submitted job."""


class NotAttached(InputError, ConnectionError):
    """The cluster does not let this process in."""


@contextmanager
def connect(config: ClusterConfig, run: str) -> Iterator[None]:
    """Connect to the configured cluster; Ray's log lines of the actors come along.

    Runs share a cluster without seeing each other's actors: each has a namespace of its name. A process that is connected already
    (a test) keeps its connection.

    Raises:
        AddressRefused, NotAttached: as `attach`.
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
        attach(config.address, namespace=run, runtime_env=runtime_env)
    try:
        yield
    finally:
        ray.shutdown()


def attach(address: str, **options: Any) -> None:
    """Make this process a driver of a cluster: `auto` (that of RAY_ADDRESS, else that of this machine), `HOST:PORT` or `ray://HOST:PORT`.

    Args:
        options: of `ray.init`.

    Raises:
        AddressRefused: it is none of these, nobody answers there, or `auto` finds no cluster.
        NotAttached: it does not let this process in, or ends meanwhile.
    """
    named = os.environ.get(RAY_ADDRESS, "").strip()
    # A jobs API, as `rlhf-ray submit` wants it; Ray would take it for the cluster.
    hidden = address == AUTO and is_url(named)
    hint = f"; {RAY_ADDRESS}={named} is the jobs API, and this command attaches to the cluster itself" if hidden else ""
    allowed = f"{CLUSTER_ALLOWED}{hint}"
    with unset(*[RAY_ADDRESS] * hidden):
        _check(address, allowed)
        try:
            ray.init(address=address, **options)
        except AuthenticationError as error:
            said = str(error).strip().splitlines()[0]
            raise NotAttached(f"{address}: {said}; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH") from error
        except (ConnectionError, RpcError) as error:
            raise NotAttached(f"{address}: {error}; {allowed}") from error


def _check(address: str, allowed: str) -> None:
    """Whether Ray can be asked to attach.

    Raises:
        AddressRefused: no address of a cluster, or nobody answers there.
    """
    named = os.environ.get(RAY_ADDRESS, "").strip() if address == AUTO else ""
    if address == AUTO and named in ("", AUTO):
        check_this_machine(allowed)
        return
    if host_and_port(named or address) is None:
        whose = f"{RAY_ADDRESS}={named}" if named else repr(address)
        raise AddressRefused(f"{whose} is no address of a cluster to attach to; {allowed}")
    check_answers(named or address, allowed)


def local_runtime_env() -> dict[str, str]:
    """What worker processes on this machine need: Ray starts them by a shell and does not quote the interpreter's path."""
    quoted = shlex.quote(sys.executable)
    return {} if quoted == sys.executable else {"py_executable": quoted}
