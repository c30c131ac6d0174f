"""The checks behind alerts. Each looks at the metrics of a step and at the steps before it. All are pure functions.

A check returns None if the step does not have its metric, or if there are too few steps for a verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, Literal

import numpy as np

from rlhf_ray.config.telemetry import AlertsConfig

Record = Mapping[str, Any]
"""One line of metrics.jsonl."""
AlertName = Literal[
    "not_finite", "kl_high", "entropy_collapse", "longer_for_reward", "eos_falling", "throughput_collapse"
]
_MIN_STEPS = 10
"""Steps needed for a trend: a line through fewer is mostly noise."""
_MIN_RISE = 0.5
"""Smallest rise of the reward that can explain longer responses, in standard deviations of the scores within a batch."""
_MUST_BE_FINITE = (
    "reward/mean", "kl/sequence", "policy/loss", "policy/entropy", "policy/approx_kl", "policy/grad_norm",
    "value/loss", "value/grad_norm", "return/mean", "discriminator/loss",
)  # fmt: skip
"""Metrics for which null means NaN or infinite."""


@dataclass(frozen=True)
class StepSummary:
    """What trends need of one step. None means that the step did not measure it."""

    reward: float | None
    reward_std: float | None
    """Standard deviation of the scores within the batch."""
    length: float | None
    eos_rate: float | None
    entropy: float | None
    throughput: float | None

    @classmethod
    def from_record(cls, record: Record) -> StepSummary:
        """Take the values from a line of metrics.jsonl."""
        names = ("reward/mean", "reward/std", "response/length_mean", "response/eos_rate", "policy/entropy")
        return cls(*(record.get(name) for name in (*names, "throughput/tokens_per_s")))


@dataclass(frozen=True)
class History:
    """What checks remember, including the newest step."""

    window: tuple[StepSummary, ...] = ()
    """The last `alerts.window` steps."""
    first_entropies: tuple[float, ...] = ()
    """Entropies of the first `alerts.first_steps` steps."""
    best_eos_rate: float | None = None
    """Highest mean over `alerts.first_steps` consecutive steps."""

    def after(self, record: Record, config: AlertsConfig) -> History:
        """The history with one more step."""
        step = StepSummary.from_record(record)
        window = (*self.window, step)[-config.window :]
        first = self.first_entropies
        if step.entropy is not None and len(first) < config.first_steps:
            first = (*first, step.entropy)
        recent = _recent_mean(window, "eos_rate", config.first_steps)
        best = self.best_eos_rate
        if recent is not None:
            best = recent if best is None else max(best, recent)
        return History(window, first, best)


@dataclass(frozen=True)
class Finding:
    """The result of a check at one step."""

    abnormal: bool
    message: str
    """What is wrong, with values; the beginning of a sentence."""
    immediate: bool = False
    """Whether one abnormal step is enough for an alert, without patience."""


@dataclass(frozen=True)
class Check:
    """One check and its messages."""

    run: Callable[[History, Record, AlertsConfig], Finding | None]
    remedy: str
    """What to do."""
    resolved: str
    """Message when the alert ends; the beginning of a sentence."""


def _not_finite(history: History, record: Record, config: AlertsConfig) -> Finding | None:
    lost = [name for name in _MUST_BE_FINITE if name in record and record[name] is None]
    return Finding(bool(lost), f"{', '.join(lost)}: not finite", immediate=True) if config.not_finite else None


def _kl_high(history: History, record: Record, config: AlertsConfig) -> Finding | None:
    kl = record.get("kl/sequence")
    if kl is None or config.kl is None:
        return None
    message = f"the KL to the reference is {kl:.3g} nats per response, above alerts.kl = {config.kl:g}"
    return Finding(kl > config.kl, message)


def _entropy_collapse(history: History, record: Record, config: AlertsConfig) -> Finding | None:
    now, first = _recent_mean(history.window, "entropy", config.first_steps), history.first_entropies
    if config.entropy is None or now is None or len(first) < config.first_steps:
        return None
    initial = fmean(first)
    share = now / initial if initial > 0 else 1.0
    message = f"the policy's entropy is {now:.3g} nats per token, {share:.0%} of the initial {initial:.3g}"
    return Finding(share < config.entropy, f"{message} (alerts.entropy = {config.entropy:g})")


def _longer_for_reward(history: History, record: Record, config: AlertsConfig) -> Finding | None:
    known = [
        (step.reward, step.length, step.reward_std)
        for step in history.window
        if step.reward is not None and step.reward_std is not None and step.length is not None
    ]
    if config.length_growth is None or len(known) < _MIN_STEPS:
        return None
    rewards, lengths, stds = zip(*known, strict=True)
    reward_from, reward_to = fitted_ends(rewards)
    length_from, length_to = fitted_ends(lengths)
    rise, growth = reward_to - reward_from, length_to / max(length_from, 1.0) - 1.0
    return Finding(
        growth >= config.length_growth and rise > _MIN_RISE * fmean(stds),
        f"over {len(known)} steps the reward rose by {rise:.3g} while responses grew by {growth:.0%}, to {length_to:.0f} tokens "
        f"(alerts.length_growth = {config.length_growth:g})",
    )


def _eos_falling(history: History, record: Record, config: AlertsConfig) -> Finding | None:
    now, best = _recent_mean(history.window, "eos_rate", config.first_steps), history.best_eos_rate
    if config.eos_rate_drop is None or now is None or best is None:
        return None
    message = f"the policy ends {now:.0%} of its responses with an end-of-sequence token, after {best:.0%} at its best"
    return Finding(best - now > config.eos_rate_drop, f"{message} (alerts.eos_rate_drop = {config.eos_rate_drop:g})")


def _throughput_collapse(history: History, record: Record, config: AlertsConfig) -> Finding | None:
    *before, now = (step.throughput for step in history.window)
    known = [value for value in before if value is not None]
    if config.throughput is None or now is None or len(known) < _MIN_STEPS:
        return None
    usual = median(known)
    message = (
        f"the throughput is {now:,.0f} tokens/s instead of {usual:,.0f} (alerts.throughput = {config.throughput:g})"
    )
    return Finding(now < config.throughput * usual, message)


CHECKS: dict[AlertName, Check] = {
    "not_finite": Check(
        _not_finite, "stop and resume from the last checkpoint with a lower learning rate, or find the reward that is not finite",
        "all metrics are finite",
    ),
    "kl_high": Check(
        _kl_high, "raise ppo.algorithm.kl.coefficient or lower the policy's learning rate; read samples.jsonl for nonsense",
        "the KL to the reference is within its limit",
    ),
    "entropy_collapse": Check(
        _entropy_collapse, "set ppo.algorithm.entropy_coefficient, lower the learning rate, or raise the KL coefficient",
        "the entropy has recovered",
    ),
    "longer_for_reward": Check(
        _longer_for_reward, "read samples.jsonl: the reward may prefer long responses; see the length bias in the report, and "
        "ppo.algorithm.overlong",
        "reward and length no longer grow together",
    ),
    "eos_falling": Check(
        _eos_falling, "responses are cut off; set ppo.algorithm.missing_eos_penalty, or raise max_new_tokens if they need it",
        "the EOS rate has recovered",
    ),
    "throughput_collapse": Check(
        _throughput_collapse, "look at time/* for the slow phase, and at the events for workers that died",
        "the throughput is normal",
    ),
}  # fmt: skip


def fitted_ends(values: Sequence[float]) -> tuple[float, float]:
    """First and last value of the least-squares line through at least two equally spaced values."""
    slope, start = np.polyfit(np.arange(len(values)), np.asarray(values, dtype=np.float64), 1)
    return float(start), float(start + slope * (len(values) - 1))


def _recent_mean(window: Sequence[StepSummary], name: str, steps: int) -> float | None:
    """Mean over the last steps; None unless all of them measured it."""
    values = [getattr(step, name) for step in window[-steps:]]
    return fmean(values) if len(values) == steps and None not in values else None
