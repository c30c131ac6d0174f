"""Middleware in front of the gateway: keys, rate limits, body size, and requests in flight.

Invariants: no part of a body is read before the caller is authenticated; every refusal is an OpenAI error with the usual status;
a request counts as in flight until its last byte is sent or its client has disconnected.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import time
from collections.abc import Mapping

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf_ray.config.serving import LimitsConfig
from rlhf_ray.errors import InputError

SHORTEST = 16
"""Minimum number of characters of a key."""


class KeysError(InputError, ValueError):
    """The keys in the environment are not in the expected form."""


def digest(key: str) -> str:
    """SHA-256 of a key. A fast hash is enough, because keys are long and random."""
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(variable: str, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Callers' names by the digest of their keys, from an environment variable `name:key,name:key`; empty if it is not set.

    Raises:
        KeysError: naming the position of the wrong entry, without showing it.
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
    """A random key."""
    return f"rlhf-{secrets.token_urlsafe(24)}"


OPEN_PATHS = frozenset({"/health"})
"""Paths that need no key."""
ANONYMOUS = "anonymous"
"""Name of all callers if no key is needed."""


class Guard:
    """ASGI middleware that lets a request pass or refuses it."""

    def __init__(self, app: ASGIApp, keys: Mapping[str, str] | None, limits: LimitsConfig) -> None:
        """`keys`: callers' names by digest; None: no key is needed."""
        self.app, self.keys, self.limits = app, keys, limits
        self.in_flight = 0
        self._rate = RateLimitItemPerMinute(limits.requests_per_minute)
        self._window = MovingWindowRateLimiter(MemoryStorage())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        caller = self._caller(headers.get(b"authorization", b""))
        if caller is None:
            await refuse(
                send, 401, "a valid key is required: Authorization: Bearer KEY", {"www-authenticate": "Bearer"}
            )
        elif not self._window.hit(self._rate, caller):
            wait = max(1, math.ceil(self._window.get_window_stats(self._rate, caller).reset_time - time.time()))
            text = f"more than {self.limits.requests_per_minute} requests in a minute; try again in {wait} s"
            await refuse(send, 429, text, {"retry-after": str(wait)})
        elif self.in_flight >= self.limits.in_flight:
            text = f"{self.in_flight} requests are being answered or waiting; try again soon"
            await refuse(send, 503, text, {"retry-after": "1"})
        elif _length(headers) > self.limits.body_kb * 1024:
            await self._too_large(send)
        else:
            await self._pass(scope, receive, send)

    def _caller(self, authorization: bytes) -> str | None:
        if self.keys is None:
            return ANONYMOUS
        scheme, _, key = authorization.decode("latin-1").partition(" ")
        # A lookup by digest takes a time that does not depend on the key, so timing reveals nothing.
        return self.keys.get(digest(key.strip())) if scheme.lower() == "bearer" else None

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        received, started, too_large = 0, False, False

        async def counted() -> Message:
            nonlocal received, too_large
            message = await receive()
            received += len(message.get("body", b""))
            too_large = too_large or received > self.limits.body_kb * 1024
            # The application sees a client that has disconnected and stops; its response is not sent.
            return {"type": "http.disconnect"} if too_large else message

        async def send_unless_too_large(message: Message) -> None:
            nonlocal started
            if started or not too_large:
                started = True
                await send(message)

        self.in_flight += 1
        try:
            await self.app(scope, counted, send_unless_too_large)
        except Exception:
            if not too_large or started:
                raise
        finally:
            self.in_flight -= 1
        if too_large and not started:
            await self._too_large(send)

    async def _too_large(self, send: Send) -> None:
        await refuse(send, 413, f"the request is larger than {self.limits.body_kb} KiB")


def error_body(status: int, message: str) -> dict[str, object]:
    """An error in OpenAI's format."""
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "code": status}}


async def refuse(send: Send, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
    """Send an error response."""
    body = json.dumps(error_body(status, message)).encode()
    fields = {"content-type": "application/json", "content-length": str(len(body))} | dict(headers or {})
    encoded = [(name.encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


def _length(headers: Mapping[bytes, bytes]) -> int:
    """The length in the header. `_pass` also counts the bytes, so a wrong header does not help."""
    value = headers.get(b"content-length", b"0")
    return int(value) if value.isdigit() else 0
