"""What services cost: requests, waiting, tokens, money. Counts that add up over sources, workers and steps.

Invariant: `a + b` is the usage of both together; only `metrics` divides.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Usage:
    """Of one service, since it was last asked for."""

    requests: int = 0
    """Sent, repeated ones included."""
    retries: int = 0
    """Sent again, because the service could not be reached, was slow, busy or broken."""
    unreadable: int = 0
    """Answers that could not be read."""
    failures: int = 0
    """Questions that were given up."""
    questions: int = 0
    """Asked, whether of the service or of the cache."""
    cached: int = 0
    """Of these answered by the cache."""
    answers: int = 0
    """Requests that were answered, which the latency is of."""
    latency_s: float = 0.0
    """Their sum."""
    slowest_s: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    comparisons: int = 0
    """Made in both orders."""
    flipped: int = 0
    """Of these said otherwise in the other order."""
    first: float = 0.0
    """Votes for the response that came first, two for each comparison."""

    def __add__(self, other: Usage) -> Usage:
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return Usage(**sums | {"slowest_s": max(self.slowest_s, other.slowest_s)})

    def metrics(self, name: str) -> dict[str, float]:
        """By the names of `telemetry.names`; what was not measured is not there."""
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


class Meter:
    """Adds up a service's usage; safe with threads."""

    def __init__(self) -> None:
        self._usage = Usage()
        self._lock = threading.Lock()

    def add(self, **counts: float) -> None:
        """Add to the fields of these names."""
        with self._lock:
            self._usage += Usage(**counts)

    def take(self) -> Usage:
        """What came together since the last call."""
        with self._lock:
            usage, self._usage = self._usage, Usage()
        return usage
