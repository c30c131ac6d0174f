"""Addresses of a Ray cluster: of its jobs API (HTTP), and of the cluster itself, to which a driver attaches.

Ray reads both from RAY_ADDRESS, which overrides its arguments, and waits for minutes if nothing answers. Here the command line
wins, and an address that cannot work is refused before Ray is called.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import urlsplit

from rlhf_ray.errors import InputError

AUTO, RAY_ADDRESS = "auto", "RAY_ADDRESS"
JOBS_VARIABLES = ("RAY_API_SERVER_ADDRESS", RAY_ADDRESS)
"""The variables in which Ray looks for the jobs API, in this order."""
JOBS_ALLOWED = "allowed: http://HOST:8265 (the cluster's dashboard; https:// too), or auto on a node of the cluster"
CLUSTER_ALLOWED = "allowed: auto on a node of the cluster, HOST:PORT of its head (6379), or ray://HOST:10001"
_HOST_AND_PORT = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):(?P<port>\d{1,5})")


class AddressRefused(InputError, ValueError):
    """The address is invalid or of the wrong kind, or nothing answers there."""


def is_url(address: str | None) -> bool:
    """Whether the address is an HTTP one of the jobs API, to which no driver can attach."""
    return (address or "").lower().startswith(("http://", "https://"))


def jobs_address(given: str | None, environment: Mapping[str, str]) -> str | None:
    """The address of the jobs API: the given one, else that of the environment; None if there is neither.

    In the environment Ray also accepts the address of the cluster itself, and asks the cluster for its dashboard. Jobs and the
    nodes of some launchers have such an address.

    Raises:
        AddressRefused: the address is invalid; the message says where it comes from.
    """
    if given is not None:
        if given != AUTO and not _is_sound_url(given):
            raise AddressRefused(f"--address {given}: not the address of a jobs API; {JOBS_ALLOWED}")
        return given
    for variable in JOBS_VARIABLES:
        if found := environment.get(variable, "").strip():
            if found != AUTO and not _is_sound_url(found) and host_and_port(found) is None:
                raise AddressRefused(f"{variable}={found}: not the address of a cluster; {JOBS_ALLOWED}")
            return found
    return None


def host_and_port(address: str) -> tuple[str, int] | None:
    """The host and port of `HOST:PORT` or `ray://HOST:PORT`; None for anything else."""
    found = _HOST_AND_PORT.fullmatch(address.removeprefix("ray://"))
    if found is None or not 0 < int(found["port"]) < 1 << 16:
        return None
    return found["host"].strip("[]"), int(found["port"])


def check_answers(address: str, allowed: str, timeout_s: float = 10.0) -> None:
    """Try to connect to the port of `HOST:PORT` or `ray://HOST:PORT`. (Ray itself would try for minutes.)

    Raises:
        AddressRefused: nothing answers there, the host does not exist, or the address is invalid.
    """
    where = host_and_port(address)
    if where is None:
        raise AddressRefused(f"{address!r} is not the address of a cluster; {allowed}")
    try:
        socket.create_connection(where, timeout_s).close()
    except OSError as error:
        raise AddressRefused(f"{address}: nothing answers there ({error}); {allowed}") from error


def check_this_machine(allowed: str) -> None:
    """Check the cluster that Ray finds for `auto` without RAY_ADDRESS: that of a node on this machine, running or not.

    Raises:
        AddressRefused: there is none, or it has ended.
    """
    from ray._private import services

    try:
        found = services.canonicalize_bootstrap_address_or_die(AUTO)
    except ConnectionError as error:
        raise AddressRefused(f"no node of a Ray cluster is running on this machine; {allowed}") from error
    check_answers(found, f"the last cluster of this machine was there; {allowed}")


@contextmanager
def unset(*variables: str) -> Iterator[None]:
    """Remove these variables from this process's environment until the block ends."""
    kept = {name: os.environ.pop(name) for name in variables if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _is_sound_url(address: str) -> bool:
    if not is_url(address):
        return False
    try:
        parts = urlsplit(address)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is above 65535 or not a number
        return False
