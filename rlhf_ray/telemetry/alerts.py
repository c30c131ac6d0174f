"""When the figures of a run call for a person. Pure: a fold over the records of its steps.

Invariants: the state after a step is a function of the config and of the records up to it, so a resumed run knows which alerts
last, and fires none of them again; an alert begins once, and is over once, before it can begin again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from rlhf_ray.config.alerts import AlertsConfig
from rlhf_ray.telemetry.alert_checks import CHECKS, AlertName, Finding, Past

Record = Mapping[str, float | int | None]
"""One line of metrics.jsonl."""


@dataclass(frozen=True)
class Alert:
    """An alert that begins, or is over."""

    name: AlertName
    change: Literal["begins", "is over"]
    step: int
    """Where this was found."""
    since: int
    """First step at which it held."""
    message: str
    """A sentence: what, how much, since when, and what to do."""


@dataclass(frozen=True)
class Streak:
    """How one alert stands."""

    held: int = 0
    """Steps in a row, the newest included."""
    quiet: int = 0
    """Steps in a row, the newest included, at which it did not hold; counted while the alert lasts."""
    since: int = 0
    lasts: bool = False

    def after(self, finding: Finding, step: int, patience: int) -> Streak:
        """With one more step that measured it."""
        if finding.holds:
            held = self.held + 1
            since = self.since if self.held or self.lasts else step
            return Streak(held, 0, since, self.lasts or held >= (1 if finding.at_once else patience))
        quiet = self.quiet + 1
        return Streak(0, quiet, self.since, True) if self.lasts and quiet < patience else Streak()


@dataclass(frozen=True)
class WatchState:
    """Everything that is known after a step."""

    past: Past = Past()
    streaks: Mapping[AlertName, Streak] = field(default_factory=dict)

    def lasts(self, name: AlertName) -> bool:
        """Whether an alert has begun and is not over."""
        return name in self.streaks and self.streaks[name].lasts


def advance(state: WatchState, record: Record, config: AlertsConfig) -> tuple[WatchState, tuple[Alert, ...]]:
    """The state after one more step, and the alerts that begin or are over there."""
    step = int(record["step"])
    past = state.past.after(record, config)
    streaks, alerts = dict(state.streaks), []
    for name, check in CHECKS.items():
        finding = check.look(past, record, config)
        if finding is None:
            continue
        before = streaks.get(name, Streak())
        after = streaks[name] = before.after(finding, step, config.patience)
        if after.lasts and not before.lasts:
            message = f"{finding.said}, since step {after.since}: {check.remedy}"
            alerts.append(Alert(name, "begins", step, after.since, message))
        elif before.lasts and not after.lasts:
            message = f"{check.over} since step {step - config.patience + 1}; it was not from step {before.since} on"
            alerts.append(Alert(name, "is over", step, before.since, message))
    return WatchState(past, streaks), tuple(alerts)


def replayed(records: Iterable[Record], config: AlertsConfig) -> WatchState:
    """The state after steps that were recorded before; what they fired is in the events already."""
    state = WatchState()
    for record in records:
        state, _ = advance(state, record, config)
    return state
