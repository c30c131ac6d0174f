"""Alerts: when the metrics of a run need a person's attention, and the log that turns alerts into events.

Invariants: the state after a step is a function of the config and of the records up to it, so a resumed run knows which alerts
are active and does not fire them again; an alert ends before it can begin again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, cast, get_args

from rlhf_ray.config.telemetry import AlertsConfig
from rlhf_ray.runs.events import Event, EventLog, read_events
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.telemetry.alert_checks import CHECKS, AlertName, Finding, History, Record
from rlhf_ray.telemetry.prometheus import AlertGauge

_BEGINS: Literal["begins"] = "begins"
_OVER: Literal["is over"] = "is over"


class AlertLog:
    """Watches one PPO stage and records its alerts as events. The driver has one."""

    def __init__(self, config: AlertsConfig, folder: RunFolder, events: EventLog, before: Iterable[Record]) -> None:
        """`before`: records of the steps that are done. Their alerts are in the events already and are not fired again."""
        self._config, self._events, self._gauge = config, events, AlertGauge(folder.name)
        self._state = replay(before, config)
        self._withdraw(raised_alerts(read_events(folder.events)))
        self._export()

    def observe(self, record: Record) -> tuple[Alert, ...]:
        """Process the record of one more step; returns the alerts that begin or end there, after recording them as events."""
        self._state, alerts = advance(self._state, record, self._config)
        for alert in alerts:
            self._emit(alert.name, alert.change, alert.step, alert.message)
        self._export()
        return alerts

    def _withdraw(self, raised: Iterable[RaisedAlert]) -> None:
        """End alerts that began in a step which the resumed run repeats, or under a limit that was changed."""
        for alert in raised:
            if alert.ended_at is None and not self._state.is_active(alert.name):
                message = f"{alert.name} of step {alert.step} is withdrawn: the run was resumed before it or with other limits"
                self._emit(alert.name, _OVER, alert.step, message)

    def _emit(self, name: str, change: str, step: int, message: str) -> None:
        self._events.emit("alert", message, alert=name, change=change, step=step)

    def _export(self) -> None:
        self._gauge.set({name: self._state.is_active(name) for name in get_args(AlertName)})


@dataclass(frozen=True)
class Alert:
    """An alert that begins or ends."""

    name: AlertName
    change: Literal["begins", "is over"]
    step: int
    """The step at which it begins or ends."""
    since: int
    """The first abnormal step."""
    message: str
    """A sentence that says what is wrong, by how much, since when, and what to do."""


@dataclass(frozen=True)
class CheckState:
    """The state of one check."""

    abnormal_steps: int = 0
    """Number of consecutive abnormal steps up to the newest."""
    normal_steps: int = 0
    """Number of consecutive normal steps up to the newest, while the alert is active."""
    since: int = 0
    """The first abnormal step."""
    active: bool = False

    def after(self, finding: Finding, step: int, patience: int) -> CheckState:
        """The state after one more finding."""
        if finding.abnormal:
            abnormal = self.abnormal_steps + 1
            since = self.since if self.abnormal_steps or self.active else step
            return CheckState(abnormal, 0, since, self.active or abnormal >= (1 if finding.immediate else patience))
        normal = self.normal_steps + 1
        return CheckState(0, normal, self.since, True) if self.active and normal < patience else CheckState()


@dataclass(frozen=True)
class AlertState:
    """The state of all checks after a step."""

    history: History = History()
    checks: Mapping[AlertName, CheckState] = field(default_factory=dict)

    def is_active(self, name: str) -> bool:
        """Whether an alert has begun and not ended."""
        state = self.checks.get(cast(AlertName, name))
        return state is not None and state.active


def advance(state: AlertState, record: Record, config: AlertsConfig) -> tuple[AlertState, tuple[Alert, ...]]:
    """The state after one more step, and the alerts that begin or end there."""
    step = int(record["step"])
    history = state.history.after(record, config)
    checks, alerts = dict(state.checks), []
    for name, check in CHECKS.items():
        finding = check.run(history, record, config)
        if finding is None:
            continue
        before = checks.get(name, CheckState())
        after = checks[name] = before.after(finding, step, config.patience)
        if after.active and not before.active:
            message = f"{finding.message}, since step {after.since}: {check.remedy}"
            alerts.append(Alert(name, _BEGINS, step, after.since, message))
        elif before.active and not after.active:
            message = (
                f"{check.resolved} since step {step - config.patience + 1}; it was abnormal from step {before.since}"
            )
            alerts.append(Alert(name, _OVER, step, before.since, message))
    return AlertState(history, checks), tuple(alerts)


def replay(records: Iterable[Record], config: AlertsConfig) -> AlertState:
    """The state after recorded steps, whose alerts are in the events already."""
    state = AlertState()
    for record in records:
        state, _ = advance(state, record, config)
    return state


@dataclass(frozen=True)
class RaisedAlert:
    """An alert of a run, reconstructed from its events."""

    name: str
    step: int
    """The step at which it began."""
    message: str
    ended_at: int | None
    """The step at which it ended; None if it is active."""


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
        for index, alert in enumerate(raised):
            if alert.name == name and alert.ended_at is None:
                raised[index] = RaisedAlert(name, alert.step, alert.message, step)
    return tuple(raised)
