"""When the figures of a run call for a person. Pure: a fold over the records of its steps.

Invariants: the state after a step is a function of the config and of the records up to it, so a resumed run knows which alerts
last, and fires none of them again; an alert begins once, and is over once, before it can begin again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from rlhf_ray.config.telemetry import AlertsConfig
from rlhf_ray.runs.events import Event, EventLog, read_events
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.telemetry.alert_checks import CHECKS, AlertName, Finding, Past
from rlhf_ray.telemetry.prometheus import AlertGauge

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


_BEGINS, _OVER = "begins", "is over"


@dataclass(frozen=True)
class RaisedAlert:
    """An alert of a run, as its events tell it."""

    name: str
    step: int
    """Where it began."""
    message: str
    ended_at: int | None
    """Step; None where it lasts."""


def raised_alerts(events: Iterable[Event]) -> tuple[RaisedAlert, ...]:
    """All alerts of a run in the order in which they began."""
    raised: list[RaisedAlert] = []
    for event in events:
        if event.kind != "alert":
            continue
        name, step = event.fields["alert"], event.fields["step"]
        if event.fields["change"] == _BEGINS:
            raised.append(RaisedAlert(name, step, event.message, None))
            continue
        for at, alert in enumerate(raised):
            if alert.name == name and alert.ended_at is None:
                raised[at] = RaisedAlert(name, alert.step, alert.message, step)
    return tuple(raised)


class AlertLog:
    """Watches one PPO stage. The driver has one."""

    def __init__(self, config: AlertsConfig, folder: RunFolder, events: EventLog, before: Iterable[Record]) -> None:
        """`before`: the records of the steps that are done; what they fired is in the events, and is not fired again."""
        self._config, self._events, self._gauge = config, events, AlertGauge(folder.name)
        self._state = replayed(before, config)
        self._withdraw(raised_alerts(read_events(folder.events)))
        self._export()

    def observe(self, record: Record) -> tuple[Alert, ...]:
        """One more step, as it was recorded; the alerts that it begins or ends, which are events now."""
        self._state, alerts = advance(self._state, record, self._config)
        for alert in alerts:
            self._emit(alert.name, alert.change, alert.step, alert.message)
        self._export()
        return alerts

    def _withdraw(self, raised: Iterable[RaisedAlert]) -> None:
        """Alerts that began in steps which the run takes again, or under limits that it no longer has."""
        for alert in raised:
            if alert.ended_at is None and not self._state.lasts(alert.name):
                message = (
                    f"{alert.name} of step {alert.step} is withdrawn: the run goes on from before it, or without it"
                )
                self._emit(alert.name, _OVER, alert.step, message)

    def _emit(self, name: str, change: str, step: int, message: str) -> None:
        self._events.emit("alert", message, alert=name, change=change, step=step)

    def _export(self) -> None:
        self._gauge.set({name: self._state.lasts(name) for name in get_args(AlertName)})
