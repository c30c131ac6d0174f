"""In front of everything: who asks, how often, how much, and how many at a time.

Invariants: nothing of a body is read before its sender is known; every refusal is an OpenAI error with a status that clients
understand; a request counts as in flight until its last byte is sent or its client is gone.
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


OPEN_PATHS = frozenset({"/health"})
ANYBODY = "anybody"


class Guard:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, keys: Mapping[str, str] | None, limits: LimitsConfig) -> None:
        """`keys`: digest to name; None: everybody may ask."""
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
            await refuse(send, 401, "a valid key is needed: Authorization: Bearer KEY", {"www-authenticate": "Bearer"})
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
            return ANYBODY
        scheme, _, key = authorization.decode("latin-1").partition(" ")
        # Digests are compared by looking them up: how long that takes says nothing of a key.
        return self.keys.get(digest(key.strip())) if scheme.lower() == "bearer" else None

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        received, started, too_large = 0, False, False

        async def counted() -> Message:
            nonlocal received, too_large
            message = await receive()
            received += len(message.get("body", b""))
            too_large = too_large or received > self.limits.body_kb * 1024
            # What is behind sees a client that went away, and gives up; its last words are kept back.
            return {"type": "http.disconnect"} if too_large else message

        async def noted(message: Message) -> None:
            nonlocal started
            if started or not too_large:
                started = True
                await send(message)

        self.in_flight += 1
        try:
            await self.app(scope, counted, noted)
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
    """An error as OpenAI's clients read it."""
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "code": status}}


async def refuse(send: Send, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
    """Answer with an error."""
    body = json.dumps(error_body(status, message)).encode()
    fields = {"content-type": "application/json", "content-length": str(len(body))} | dict(headers or {})
    encoded = [(name.encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


def _length(headers: Mapping[bytes, bytes]) -> int:
    """What the sender says; whoever lies is counted."""
    value = headers.get(b"content-length", b"0")
    return int(value) if value.isdigit() else 0
