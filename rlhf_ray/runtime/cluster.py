"""Connects to the Ray cluster of a run: an existing one, or a private one that is started and ended with the run."""

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
    """The cluster refused this process."""


@contextmanager
def connect(config: ClusterConfig, run: str) -> Iterator[None]:
    """Connect to the configured cluster until the block ends.

    Each run has a Ray namespace with its name, so runs on one cluster do not see each other's actors. A process that is connected
    already (in a test) keeps its connection.

    Raises:
        AddressRefused, NotAttached: as `attach`.
    """
    if ray.is_initialized():
        yield
        return
    if config.address is None:
        ray.init(address="local", include_dashboard=False, log_to_driver=False, runtime_env=local_runtime_env())
    else:
        # The nodes have the libraries installed. This package is sent to them, so that driver and actors have the same version. A
        # submitted job has it in its working directory.
        runtime_env = {} if JOB in os.environ else {"py_modules": [rlhf_ray]}
        attach(config.address, namespace=run, runtime_env=runtime_env)
    try:
        yield
    finally:
        ray.shutdown()


def attach(address: str, **options: Any) -> None:
    """Make this process a driver of the cluster at an address.

    Args:
        address: `auto` (the cluster of RAY_ADDRESS, else that of this machine), `HOST:PORT` or `ray://HOST:PORT`.
        options: passed to `ray.init`.

    Raises:
        AddressRefused: the address is invalid, nothing answers there, or `auto` finds no cluster.
        NotAttached: the cluster refuses this process, or ends meanwhile.
    """
    named = os.environ.get(RAY_ADDRESS, "").strip()
    # An address of the jobs API, which `rlhf-ray submit` uses. Ray would take it for the address of the cluster.
    hidden = address == AUTO and is_url(named)
    hint = f"; {RAY_ADDRESS}={named} is the jobs API, and this command attaches to the cluster itself" if hidden else ""
    allowed = f"{CLUSTER_ALLOWED}{hint}"
    with unset(*[RAY_ADDRESS] * hidden):
        _check(address, allowed)
        try:
            ray.init(address=address, **options)
        except AuthenticationError as error:
            reason = str(error).strip().splitlines()[0]
            raise NotAttached(f"{address}: {reason}; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH") from error
        except (ConnectionError, RpcError) as error:
            raise NotAttached(f"{address}: {error}; {allowed}") from error


def _check(address: str, allowed: str) -> None:
    """Check an address before Ray tries to attach.

    Raises:
        AddressRefused: it is not the address of a cluster, or nothing answers there.
    """
    named = os.environ.get(RAY_ADDRESS, "").strip() if address == AUTO else ""
    if address == AUTO and named in ("", AUTO):
        check_this_machine(allowed)
        return
    if host_and_port(named or address) is None:
        shown = f"{RAY_ADDRESS}={named}" if named else repr(address)
        raise AddressRefused(f"{shown} is not the address of a cluster to attach to; {allowed}")
    check_answers(named or address, allowed)


def local_runtime_env() -> dict[str, str]:
    """The runtime environment of this machine's worker processes. Ray starts them in a shell, without quoting the interpreter."""
    quoted = shlex.quote(sys.executable)
    return {} if quoted == sys.executable else {"py_executable": quoted}
