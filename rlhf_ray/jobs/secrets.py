"""Secret values that are sent to the driver of a job, encrypted.

Ray writes the environment of a job into its logs and shows it in its API. So the values are encrypted with a key that is derived
from the cluster's token, which both sides have and no log contains.

Invariant: in transit the plain values are in no file, log, metadata or environment. The driver keeps `forwarded`; it passes
`workers.env` to the actors through Ray, which writes an actor's environment into its own logs on the nodes.
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
"""Variable in the job's environment that contains the encrypted values."""
SHORTEST = 8
"""Values of at least this many characters are treated as secrets that no packed file may contain."""


class SecretsError(InputError, ValueError):
    """The values cannot be encrypted or decrypted."""


@dataclass(frozen=True, repr=False)
class JobSecrets:
    """The values for a job's driver. Its repr does not show them."""

    forwarded: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of the driver."""
    workers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Values of `env` by their key in the config."""

    def __bool__(self) -> bool:
        return bool(self.forwarded or self.workers)

    @property
    def values(self) -> list[str]:
        """All values that may be secrets."""
        every = [*self.forwarded.values(), *(value for env in self.workers.values() for value in env.values())]
        return [value for value in every if len(value) >= SHORTEST]


def encrypt(values: JobSecrets, token: str | None) -> str:
    """Encrypt the values as a text for the job's environment.

    Raises:
        SecretsError: the cluster has no token, so everyone who reaches it could read them.
    """
    if token is None:
        raise SecretsError(
            "environment values are sent encrypted with the cluster's token, and there is none: set RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH, or set the variables on the nodes themselves and remove them here"
        )
    return Fernet(_key(token)).encrypt(json.dumps(asdict(values)).encode()).decode()


def decrypt(text: str, token: str | None) -> JobSecrets:
    """Inverse of `encrypt`.

    Raises:
        SecretsError: the token is another one, or missing.
    """
    try:
        return JobSecrets(**json.loads(Fernet(_key(token or "")).decrypt(text)))
    except InvalidToken:
        raise SecretsError(
            f"{VARIABLE} was encrypted with another token than this node's; submit again with the token of this cluster"
        ) from None


def received(environment: Mapping[str, str]) -> JobSecrets:
    """In a driver: the values that were sent with its job; empty if this process is not such a job."""
    text = environment.get(VARIABLE)
    return decrypt(text, read_token(environment)) if text else JobSecrets()


def _key(token: str) -> bytes:
    # A token is long and random, so a fast key derivation is enough.
    return base64.urlsafe_b64encode(hmac.digest(token.encode(), b"rlhf-ray confidential 1", hashlib.sha256))
