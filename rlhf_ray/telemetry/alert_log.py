"""Alerts where people see them: as events of the run, and for Prometheus; and read back from the events.

Invariant: which alerts last is the same in the events, in Prometheus and in the state that the run's records fold to, also after
a resume from before an alert.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import get_args

from rlhf_ray.config.alerts import AlertsConfig
from rlhf_ray.runs.events import Event, EventLog, read_events
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.telemetry.alert_checks import AlertName
from rlhf_ray.telemetry.alerts import Alert, Record, advance, replayed
from rlhf_ray.telemetry.prometheus import AlertGauge

_BEGINS, _OVER = "begins", "is over"


@dataclass(frozen=True)
class RaisedAlert:
    """An alert of a run, as its events tell it."""

    name: str
    step: int
    """Where it began."""
    message: str
    over_at: int | None
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
            if alert.name == name and alert.over_at is None:
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
            if alert.over_at is None and not self._state.lasts(alert.name):
                message = (
                    f"{alert.name} of step {alert.step} is withdrawn: the run goes on from before it, or without it"
                )
                self._emit(alert.name, _OVER, alert.step, message)

    def _emit(self, name: str, change: str, step: int, message: str) -> None:
        self._events.emit("alert", message, alert=name, change=change, step=step)

    def _export(self) -> None:
        self._gauge.set({name: self._state.lasts(name) for name in get_args(AlertName)})
