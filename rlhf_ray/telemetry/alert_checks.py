"""What is watched in a run: each check looks at a step and at what came before it. Pure.

A check says nothing (None) of a step that does not measure its figure, or that comes too early to judge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Literal

import numpy as np

from rlhf_ray.config.telemetry import AlertsConfig

AlertName = Literal[
    "not_finite", "kl_high", "entropy_collapse", "longer_for_reward", "eos_falling", "throughput_collapse"
]
_JUDGED_FROM = 10
"""Steps: a line through fewer is mostly noise."""
_RISE = 0.5
"""Of the scores' standard deviation within a batch: a reward that rises by less is not what makes responses longer."""
_FINITE = (
    "reward/mean", "kl/sequence", "policy/loss", "policy/entropy", "policy/approx_kl", "policy/grad_norm",
    "value/loss", "value/grad_norm", "return/mean", "discriminator/loss",
)  # fmt: skip
"""Figures of which null means NaN or infinite."""


@dataclass(frozen=True)
class Point:
    """What trends need of one step; None where the step did not measure it."""

    reward: float | None
    spread: float | None
    """Standard deviation of the scores within the batch."""
    length: float | None
    eos_rate: float | None
    entropy: float | None
    throughput: float | None

    @classmethod
    def of(cls, record: Mapping[str, float | int | None]) -> Point:
        """From a line of metrics.jsonl."""
        names = ("reward/mean", "reward/std", "response/length_mean", "response/eos_rate", "policy/entropy")
        return cls(*(record.get(name) for name in (*names, "throughput/tokens_per_s")))


@dataclass(frozen=True)
class Past:
    """What checks remember, the newest step included."""

    window: tuple[Point, ...] = ()
    """The last `window` steps."""
    first_entropies: tuple[float, ...] = ()
    best_eos_rate: float | None = None
    """Highest mean over `first_steps` steps in a row."""

    def after(self, record: Mapping[str, float | int | None], config: AlertsConfig) -> Past:
        """With one more step."""
        point = Point.of(record)
        window = (*self.window, point)[-config.window :]
        first = self.first_entropies
        if point.entropy is not None and len(first) < config.first_steps:
            first = (*first, point.entropy)
        recent = _recent(window, "eos_rate", config.first_steps)
        best = self.best_eos_rate
        if recent is not None:
            best = recent if best is None else max(best, recent)
        return Past(window, first, best)


@dataclass(frozen=True)
class Finding:
    """What a check found at a step."""

    holds: bool
    said: str
    """What is wrong, with figures; the beginning of a sentence."""
    at_once: bool = False
    """No patience: one step is enough."""


Look = Callable[[Past, Mapping[str, float | int | None], AlertsConfig], Finding | None]


@dataclass(frozen=True)
class Check:
    """One thing that is watched."""

    look: Look
    remedy: str
    """What to do."""
    over: str
    """What is said when it is over; the beginning of a sentence."""


def _not_finite(past: Past, record: Mapping[str, float | int | None], config: AlertsConfig) -> Finding | None:
    lost = [name for name in _FINITE if name in record and record[name] is None]
    return Finding(bool(lost), f"{', '.join(lost)}: not finite", at_once=True) if config.not_finite else None


def _kl_high(past: Past, record: Mapping[str, float | int | None], config: AlertsConfig) -> Finding | None:
    kl = record.get("kl/sequence")
    if kl is None or config.kl is None:
        return None
    said = f"the KL to the reference is {kl:.3g} nats per response, above alerts.kl = {config.kl:g}"
    return Finding(kl > config.kl, said)


def _entropy_collapse(past: Past, record: Mapping[str, float | int | None], config: AlertsConfig) -> Finding | None:
    now, first = _recent(past.window, "entropy", config.first_steps), past.first_entropies
    if config.entropy is None or now is None or len(first) < config.first_steps:
        return None
    began = fmean(first)
    share = now / began if began > 0 else 1.0
    said = f"the policy's entropy is {now:.3g} nats per token, {share:.0%} of the {began:.3g} that it began with"
    return Finding(share < config.entropy, f"{said} (alerts.entropy = {config.entropy:g})")


def _longer_for_reward(past: Past, record: Mapping[str, float | int | None], config: AlertsConfig) -> Finding | None:
    known = [p for p in past.window if None not in (p.reward, p.spread, p.length)]
    if config.length_growth is None or len(known) < _JUDGED_FROM:
        return None
    (reward_from, reward_to), (length_from, length_to) = (
        line([p.reward for p in known]),
        line([p.length for p in known]),
    )
    rise, growth = reward_to - reward_from, length_to / max(length_from, 1.0) - 1.0
    holds = growth >= config.length_growth and rise > _RISE * fmean(p.spread for p in known)
    return Finding(
        holds,
        f"over {len(known)} steps the reward rose by {rise:.3g} while responses grew by {growth:.0%}, to {length_to:.0f} tokens "
        f"(alerts.length_growth = {config.length_growth:g})",
    )


def _eos_falling(past: Past, record: Mapping[str, float | int | None], config: AlertsConfig) -> Finding | None:
    now, best = _recent(past.window, "eos_rate", config.first_steps), past.best_eos_rate
    if config.eos_rate_drop is None or now is None or best is None:
        return None
    said = f"the policy ends {now:.0%} of its responses itself, and ended {best:.0%}"
    return Finding(best - now > config.eos_rate_drop, f"{said} (alerts.eos_rate_drop = {config.eos_rate_drop:g})")


def _throughput_collapse(past: Past, record: Mapping[str, float | int | None], config: AlertsConfig) -> Finding | None:
    *before, now = (p.throughput for p in past.window)
    known = [value for value in before if value is not None]
    if config.throughput is None or now is None or len(known) < _JUDGED_FROM:
        return None
    usual = median(known)
    said = f"{now:,.0f} tokens/s are trained, where {usual:,.0f} were usual (alerts.throughput = {config.throughput:g})"
    return Finding(now < config.throughput * usual, said)


CHECKS: dict[AlertName, Check] = {
    "not_finite": Check(
        _not_finite, "stop, resume from the last checkpoint with a lower learning rate, or look for a reward of that kind",
        "all figures are finite",
    ),
    "kl_high": Check(
        _kl_high, "raise ppo.algorithm.kl.coefficient or lower the policy's learning rate; read samples.jsonl for nonsense",
        "the KL to the reference is within its limit",
    ),
    "entropy_collapse": Check(
        _entropy_collapse, "add ppo.algorithm.entropy_coefficient, lower the learning rate, or raise the KL's coefficient",
        "the entropy is back",
    ),
    "longer_for_reward": Check(
        _longer_for_reward, "read samples.jsonl: the reward may like length itself; see the length bias in the report, and "
        "ppo.algorithm.overlong",
        "reward and length do not grow together",
    ),
    "eos_falling": Check(
        _eos_falling, "responses are cut off; set ppo.algorithm.missing_eos_penalty, or raise max_new_tokens if they need it",
        "the EOS rate is back",
    ),
    "throughput_collapse": Check(
        _throughput_collapse, "see time/* for the phase, and the events for workers that died",
        "the throughput is as usual",
    ),
}  # fmt: skip


def line(values: Sequence[float]) -> tuple[float, float]:
    """First and last value of the least-squares line through values a step apart. Needs two."""
    slope, start = np.polyfit(np.arange(len(values)), np.asarray(values, dtype=np.float64), 1)
    return float(start), float(start + slope * (len(values) - 1))


def _recent(window: Sequence[Point], name: str, steps: int) -> float | None:
    """Mean over the last steps; None unless all of them measured it."""
    values = [getattr(point, name) for point in window[-steps:]]
    return fmean(values) if len(values) == steps and None not in values else None
