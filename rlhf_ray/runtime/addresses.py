"""Addresses of a Ray cluster: of its jobs API (HTTP), and of the cluster itself, which a driver attaches to.

Ray takes both from RAY_ADDRESS, prefers it to what it is told, and waits for minutes where nobody answers. Here what was
said on the command line wins, and what cannot be right is refused before Ray is asked.
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
"""Where Ray looks for the jobs API, in its order."""
JOBS_ALLOWED = "allowed: http://HOST:8265 (the cluster's dashboard; https:// too), or auto on a node of the cluster"
CLUSTER_ALLOWED = "allowed: auto on a node of the cluster, HOST:PORT of its head (6379), or ray://HOST:10001"
_HOST_AND_PORT = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):(?P<port>\d{1,5})")


class AddressRefused(InputError, ValueError):
    """No address, one of another kind, or one where nobody answers."""


def is_url(address: str | None) -> bool:
    """Whether it is an address of the jobs API, which no driver can attach to."""
    return (address or "").lower().startswith(("http://", "https://"))


def jobs_address(given: str | None, environment: Mapping[str, str]) -> str | None:
    """Where the jobs API is: as given, else as the environment says; None: nobody said.

    In the environment Ray also takes the address of the cluster itself, which knows where its dashboard is; a job and the
    nodes of some launchers have that one.

    Raises:
        AddressRefused: it is none; the message says whose it was.
    """
    if given is not None:
        if given != AUTO and not _is_sound_url(given):
            raise AddressRefused(f"--address {given}: no address of a jobs API; {JOBS_ALLOWED}")
        return given
    for variable in JOBS_VARIABLES:
        if found := environment.get(variable, "").strip():
            if found != AUTO and not _is_sound_url(found) and host_and_port(found) is None:
                raise AddressRefused(f"{variable}={found}: no address of a cluster; {JOBS_ALLOWED}")
            return found
    return None


def host_and_port(address: str) -> tuple[str, int] | None:
    """Of `HOST:PORT` and `ray://HOST:PORT`; None for anything else."""
    found = _HOST_AND_PORT.fullmatch(address.removeprefix("ray://"))
    if found is None or not 0 < int(found["port"]) < 1 << 16:
        return None
    return found["host"].strip("[]"), int(found["port"])


def check_answers(address: str, allowed: str, timeout_s: float = 10.0) -> None:
    """Try the port of `HOST:PORT` or `ray://HOST:PORT`: Ray itself would try for minutes.

    Raises:
        AddressRefused: nobody listens there, there is no such host, or it is no such address.
    """
    where = host_and_port(address)
    if where is None:
        raise AddressRefused(f"{address!r} is no address of a cluster; {allowed}")
    try:
        socket.create_connection(where, timeout_s).close()
    except OSError as error:
        raise AddressRefused(f"{address}: nobody answers there ({error}); {allowed}") from error


def check_this_machine(allowed: str) -> None:
    """Try the cluster that Ray finds for `auto` where RAY_ADDRESS says nothing: that of a node here, or the last one that was.

    Raises:
        AddressRefused: there is none, or it has ended.
    """
    from ray._private import services

    try:
        found = services.canonicalize_bootstrap_address_or_die(AUTO)
    except ConnectionError as error:
        raise AddressRefused(f"no node of a Ray cluster runs on this machine; {allowed}") from error
    check_answers(found, f"it was the last cluster of this machine; {allowed}")


@contextmanager
def unset(*variables: str) -> Iterator[None]:
    """Without these variables of this process's environment, until the block ends."""
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
    except ValueError:  # a port beyond 65535, or no number
        return False
