"""Who may ask. Keys are kept as digests: neither the gateway's configuration nor a dump of it can give one away."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Mapping

from rlhf_ray.errors import InputError

SHORTEST = 16


class KeysError(InputError, ValueError):
    """Keys cannot be read."""


def digest(key: str) -> str:
    """SHA-256 of a key; enough, because keys are random and long."""
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(variable: str, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Digest to name of the keys `name:key,name:key` in an environment variable; nothing where it is not set.

    Raises:
        KeysError: naming the entry by its place, never showing it.
    """
    found: dict[str, str] = {}
    for number, entry in enumerate(filter(None, environment.get(variable, "").split(",")), start=1):
        name, colon, key = entry.strip().partition(":")
        if not colon or not name or len(key) < SHORTEST:
            raise KeysError(
                f"{variable}: entry {number} is not of the form name:key with a key of {SHORTEST} characters or more"
            )
        found[digest(key)] = name
    return found


def new_key() -> str:
    """A random one."""
    return f"rlhf-{secrets.token_urlsafe(24)}"
