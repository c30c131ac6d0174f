"""Values that may be secrets, on their way to the driver of a job.

Ray writes the environment of a job into its logs and shows it by its API. So the values travel encrypted under a key that is
derived from the cluster's token, which both ends have and no log does.

Invariant: on the way the plain values are in no file, log, metadata or environment. What is forwarded stays in the driver;
`workers.env` goes on to the actors of its role by Ray, which writes an actor's environment into its own logs on the nodes.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from cryptography.fernet import Fernet, InvalidToken

from rlhf_ray.errors import InputError
from rlhf_ray.jobs.connection import read_token

VARIABLE = "RLHF_RAY_CONFIDENTIAL"
"""Of the job's environment."""
SHORTEST = 8
"""Characters from which on a value is taken for a secret that no packed file may hold."""


class NotReadable(InputError, ValueError):
    """The values cannot be encrypted or decrypted."""


@dataclass(frozen=True, repr=False)
class Confidential:
    """What a job's driver gets. Prints as nothing."""

    forwarded: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of the driver."""
    workers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Values of `env` by their key in the config."""

    def __bool__(self) -> bool:
        return bool(self.forwarded or self.workers)

    @property
    def values(self) -> list[str]:
        """All that might be secret."""
        every = [*self.forwarded.values(), *(value for env in self.workers.values() for value in env.values())]
        return [value for value in every if len(value) >= SHORTEST]


def encrypt(values: Confidential, token: str | None) -> str:
    """Text for the job's environment.

    Raises:
        NotReadable: the cluster has no token, so whoever reaches it could read them.
    """
    if token is None:
        raise NotReadable(
            "environment values are sent encrypted under the cluster's token, and there is none: set RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH, or give the variables to the nodes themselves and remove them here"
        )
    return Fernet(_key(token)).encrypt(json.dumps(asdict(values)).encode()).decode()


def decrypt(text: str, token: str | None) -> Confidential:
    """What `encrypt` was given.

    Raises:
        NotReadable: another token, or none.
    """
    try:
        return Confidential(**json.loads(Fernet(_key(token or "")).decrypt(text)))
    except InvalidToken:
        raise NotReadable(
            f"{VARIABLE} was encrypted under another token than this node's; submit again with the token of this cluster"
        ) from None


def received(environment: Mapping[str, str]) -> Confidential:
    """In a driver: what was sent with its job; nothing where this is no such job."""
    text = environment.get(VARIABLE)
    return decrypt(text, read_token(environment)) if text else Confidential()


def _key(token: str) -> bytes:
    # A token is random and long: no slow derivation is needed.
    return base64.urlsafe_b64encode(hmac.digest(token.encode(), b"rlhf-ray confidential 1", hashlib.sha256))
