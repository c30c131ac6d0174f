"""The client of one HTTP service: JSON in, JSON out, with limits on concurrency, rate and time, with retries and usage figures.

Invariants: every request ends with an answer or with a `ServiceError` that gives the reason; nothing that leaves this module
(answers, errors, usage) contains the key, even where the service repeats it.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import threading
import time
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, fields
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx
from pydantic import SecretStr

from rlhf_ray.config.reward import EndpointConfig, RewardConfig
from rlhf_ray.rewards.answers import ServiceError, UnreadableAnswer

RETRYABLE_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504, 529})
"""HTTP statuses after which another attempt may succeed."""
LONGEST_WAIT_S = 60.0
QUOTED_CHARACTERS = 300
"""Characters of an answer that an error quotes."""

Result = TypeVar("Result")
ApiKeys = Mapping[str, SecretStr]
"""Keys by the names of their environment variables."""


def read_keys(reward: RewardConfig, environment: Mapping[str, str] = os.environ) -> dict[str, SecretStr]:
    """The keys that a config's services need, by the names of their variables. They are hidden when printed.

    Raises:
        ServiceError: naming the service and the variable that is not set.
    """
    for service in reward.services:
        if service.api_key_env is not None and not environment.get(service.api_key_env):
            raise ServiceError(
                f"ppo.reward: {service.name!r} needs the key that api_key_env names, and the environment variable "
                f"{service.api_key_env} is not set; export it where the run is started"
            )
    names = {service.api_key_env for service in reward.services if service.api_key_env is not None}
    return {name: SecretStr(environment[name]) for name in names}


class EventLoopThread:
    """An event loop in a thread. All threads that wait for services use it, so they share connections and limits."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="services", daemon=True).start()

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine in the loop and wait for its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()


class ServiceClient:
    """One worker's client of a service that several workers may use. Use it from a single event loop."""

    def __init__(self, config: EndpointConfig, keys: ApiKeys, workers: int, meter: UsageMeter) -> None:
        """`workers`: number of workers that share the service's rate limit."""
        self.config, self.meter = config, meter
        self._key = keys[config.api_key_env].get_secret_value() if config.api_key_env else None
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=None,  # each attempt as a whole has a time limit
            limits=httpx.Limits(max_connections=config.concurrency),
        )
        self._free = asyncio.Semaphore(config.concurrency)
        self._spacing_s = 60.0 * workers / config.requests_per_minute if config.requests_per_minute else 0.0
        self._next = 0.0
        self._random = random.Random()

    async def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Send `body` to the service's URL plus `path`, and return the JSON object that it answers.

        Raises:
            ServiceError: the service refused the request, or every attempt failed.
            UnreadableAnswer: the answer is not a JSON object.
        """
        content = _encode(body)
        url = self.config.url.rstrip("/") + path if path else self.config.url
        for attempt in range(1, self.config.attempts + 1):
            async with self._free:
                await self._wait_for_turn()
                outcome = await self._attempt(url, content)
            if isinstance(outcome, dict):
                return outcome
            reason, wait_s = outcome
            if attempt < self.config.attempts:
                self.meter.add(retries=1)
                await asyncio.sleep(self._delay_s(attempt, wait_s))
        raise ServiceError(f"{self.config.url}: {reason}, in the last of {self.config.attempts} attempts")

    async def _attempt(self, url: str, content: bytes) -> dict[str, Any] | tuple[str, float]:
        """The answer; or the reason of a failure that may pass, and the seconds that the service asks to wait."""
        self.meter.add(requests=1)
        began = time.monotonic()
        try:
            async with asyncio.timeout(self.config.timeout_s):
                response = await self._client.post(url, content=content, headers={"Content-Type": "application/json"})
        except TimeoutError:
            return f"no answer within {self.config.timeout_s:g} s", 0.0
        except httpx.RequestError as error:
            return self._without_key(f"cannot be reached ({type(error).__name__}: {error})"), 0.0
        if response.status_code in RETRYABLE_STATUSES:
            return f"HTTP {response.status_code}: {self._quoted(response)}", _retry_after(response)
        if not response.is_success:
            hint = f" (is {self.config.api_key_env} right?)" if response.status_code in (401, 403) else ""
            raise ServiceError(f"{self.config.url}: HTTP {response.status_code}{hint}: {self._quoted(response)}")
        elapsed = time.monotonic() - began
        self.meter.add(answers=1, latency_s=elapsed, slowest_s=elapsed)
        return self._decode(response)

    def _decode(self, response: httpx.Response) -> dict[str, Any]:
        try:
            answer = json.loads(response.content)
        except ValueError as error:
            raise UnreadableAnswer(f"the answer is not JSON: {self._quoted(response)}") from error
        if not isinstance(answer, dict):
            raise UnreadableAnswer(f"the answer is not a JSON object: {self._quoted(response)}")
        return answer

    async def _wait_for_turn(self) -> None:
        """Wait until the rate limit allows a request and any delay that the service asked for is over."""
        now = time.monotonic()
        start = max(now, self._next)
        self._next = start + self._spacing_s
        if start > now:
            await asyncio.sleep(start - now)

    def _delay_s(self, attempt: int, wait_s: float) -> float:
        """Seconds before the next attempt: random below an exponential bound, so that clients do not retry together."""
        if wait_s:
            # The service answers no request before then, so hold back the other requests as well.
            self._next = max(self._next, time.monotonic() + wait_s)
        bound = min(LONGEST_WAIT_S, self.config.backoff_s * 2.0 ** (attempt - 1))
        return self._random.uniform(bound / 2, bound)

    def _quoted(self, response: httpx.Response) -> str:
        return repr(self._without_key(response.text)[:QUOTED_CHARACTERS])

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "<key>") if self._key else text


def _encode(body: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise ServiceError(f"the request cannot be written as JSON: {error}; check the prompts' metadata") from error


def _retry_after(response: httpx.Response) -> float:
    """Seconds that `Retry-After` asks for (RFC 9110, section 10.2.3: seconds or a date), at most a minute; 0 without it."""
    value = response.headers.get("retry-after", "")
    try:
        seconds = float(value) if value.strip().isdigit() else parsedate_to_datetime(value).timestamp() - time.time()
    except ValueError:
        return 0.0
    return min(max(seconds, 0.0), LONGEST_WAIT_S)


@dataclass(frozen=True)
class Usage:
    """Usage of one service since the last report."""

    requests: int = 0
    """Requests sent, including retries."""
    retries: int = 0
    """Requests sent again because the service could not be reached, was slow, busy or failed."""
    unreadable: int = 0
    """Answers that could not be read."""
    failures: int = 0
    """Questions that were given up."""
    questions: int = 0
    """Questions, whether the service or the cache answered them."""
    cached: int = 0
    """Questions that the cache answered."""
    answers: int = 0
    """Requests that were answered."""
    latency_s: float = 0.0
    """Sum of the latencies of all answers."""
    slowest_s: float = 0.0
    """Longest latency of an answer."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    comparisons: int = 0
    """Pairs of responses that were compared in both orders."""
    flipped: int = 0
    """Comparisons whose verdict changed with the order."""
    first: float = 0.0
    """Votes for the response that was shown first; each comparison has two votes."""

    def __add__(self, other: Usage) -> Usage:
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return Usage(**sums | {"slowest_s": max(self.slowest_s, other.slowest_s)})

    def metrics(self, name: str) -> dict[str, float]:
        """Values by the metric names of `telemetry.names`. What was not measured has no entry."""
        figures: dict[str, float] = {
            "requests": self.requests, "retries": self.retries, "unreadable": self.unreadable, "failures": self.failures,
        }  # fmt: skip
        if self.questions:
            figures["cache_hit_rate"] = self.cached / self.questions
        if self.answers:
            figures |= {"latency_mean_s": self.latency_s / self.answers, "latency_max_s": self.slowest_s}
        if self.comparisons:
            figures["flip_rate"] = self.flipped / self.comparisons
            figures["first_rate"] = self.first / (2 * self.comparisons)
        if self.prompt_tokens or self.completion_tokens:
            figures |= {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}
        if self.cost:
            figures["cost"] = self.cost
        return {f"service/{name}/{figure}": value for figure, value in figures.items()}


class UsageMeter:
    """Adds up the usage of a service. Thread-safe."""

    def __init__(self) -> None:
        self._usage = Usage()
        self._lock = threading.Lock()

    def add(self, **counts: Any) -> None:
        """Add to the fields of these names."""
        with self._lock:
            self._usage += Usage(**counts)

    def take(self) -> Usage:
        """The usage since the last call."""
        with self._lock:
            usage, self._usage = self._usage, Usage()
        return usage
