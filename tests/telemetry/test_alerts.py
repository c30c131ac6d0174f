"""Alerts on constructed trajectories: when they begin and end, when they do not, and that a resume fires none again."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from pydantic import ValidationError

from rlhf_ray.config.telemetry import AlertsConfig
from rlhf_ray.runs.events import EventLog, read_events
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.telemetry.alert_checks import Record
from rlhf_ray.telemetry.alerts import Alert, AlertLog, AlertState, advance, raised_alerts, replay

CONFIG = AlertsConfig()
NAMES = {
    "reward": "reward/mean",
    "spread": "reward/std",
    "kl": "kl/sequence",
    "length": "response/length_mean",
    "eos": "response/eos_rate",
    "entropy": "policy/entropy",
    "speed": "throughput/tokens_per_s",
    "grad": "policy/grad_norm",
}


def records(**figures: Sequence[float | None]) -> list[Record]:
    """Steps from 1 on."""
    columns = zip(*figures.values(), strict=True)
    return [
        {"step": step, **{NAMES[name]: value for name, value in zip(figures, column, strict=True)}}
        for step, column in enumerate(columns, start=1)
    ]


def fired(steps: Sequence[Record], config: AlertsConfig = CONFIG) -> list[Alert]:
    state, alerts = AlertState(), []
    for record in steps:
        state, new = advance(state, record, config)
        alerts += new
    return alerts


def said(alerts: Sequence[Alert]) -> list[tuple[str, str, int, int]]:
    return [(alert.name, alert.change, alert.step, alert.since) for alert in alerts]


def test_kl_begins_once_after_patience_and_is_over_once():
    kl = [10, 60, 10, 60, 61, 70, 80, 90, 40, 60, 40, 40, 40, 40, 10]
    begins, over = fired(records(kl=kl))
    assert said([begins, over]) == [("kl_high", "begins", 6, 4), ("kl_high", "is over", 13, 4)]
    assert "70 nats" in begins.message and "alerts.kl = 50" in begins.message and "since step 4" in begins.message
    assert "ppo.algorithm.kl.coefficient" in begins.message
    assert "since step 11" in over.message


def test_an_alert_that_is_over_can_begin_again():
    assert [alert.change for alert in fired(records(kl=[60] * 3 + [1] * 3 + [60] * 3))] == [
        "begins",
        "is over",
        "begins",
    ]


def test_entropy_collapses_relative_to_its_beginning():
    falling = [2.0 * 0.9**step for step in range(30)]
    (alert,) = fired(records(entropy=falling))
    assert alert.name == "entropy_collapse" and 18 <= alert.since <= alert.step - 2
    assert not fired(records(entropy=[2.0 * 0.97**step for step in range(30)]))
    assert not fired(records(entropy=[0.0] * 30)), "a policy without entropy has nothing to lose"


def hacking(steps: int, growth: float, reward: float) -> list[Record]:
    share = [step / (steps - 1) for step in range(steps)]
    return records(
        reward=[reward * s for s in share], spread=[1.0] * steps, length=[100 * (1 + growth * s) for s in share]
    )


@pytest.mark.parametrize(
    ("steps", "growth", "reward", "fires"),
    [
        (40, 2.0, 3.0, True),
        (40, 0.5, 3.0, False),  # a little longer
        (40, 2.0, -3.0, False),  # longer, and no better
        (40, 2.0, 0.2, False),  # within the noise of a batch
        (9, 3.0, 3.0, False),  # too early to tell
    ],
)
def test_reward_that_grows_with_the_length(steps, growth, reward, fires):
    alerts = fired(hacking(steps, growth, reward))
    assert [alert.name for alert in alerts] == ["longer_for_reward"] * fires
    if fires:
        assert "the reward rose by" in alerts[0].message and "samples.jsonl" in alerts[0].message


def test_length_that_grew_long_ago_is_ignored():
    short = AlertsConfig(window=10)
    grown = hacking(20, 3.0, 3.0)
    flat = [{**grown[-1], "step": step} for step in range(21, 51)]
    assert [alert.change for alert in fired([*grown, *flat], short)] == ["begins", "is over"]


def test_eos_rate_falls_from_its_best():
    rate = [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.95, 0.95, 0.95, 0.95] + [0.95 - 0.05 * n for n in range(12)]
    (alert,) = fired(records(eos=rate))
    assert alert.name == "eos_falling" and "95%" in alert.message and alert.step > 12
    assert not fired(records(eos=[0.4] * 30)), "low from the beginning is not falling"
    assert not fired(records(eos=[0.9, 0.5] * 15)), "noise"


def test_throughput_collapses_against_its_median():
    (begins, over) = fired(records(speed=[1000.0] * 15 + [100.0] * 5 + [1000.0] * 5))
    assert said([begins, over]) == [
        ("throughput_collapse", "begins", 18, 16),
        ("throughput_collapse", "is over", 23, 16),
    ]
    assert not fired(records(speed=[1000.0, 900, 100] * 10)), "every third step writes a checkpoint"


def test_metrics_that_are_not_finite_are_named_immediately():
    (begins, over) = fired(records(grad=[1.0, None, 1.0, 1.0, 1.0], kl=[1.0, None, 1.0, 1.0, 1.0]))
    assert said([begins, over]) == [("not_finite", "begins", 2, 2), ("not_finite", "is over", 5, 2)]
    assert "kl/sequence, policy/grad_norm: not finite" in begins.message


def test_null_switches_each_off():
    off = AlertsConfig(
        kl=None, entropy=None, eos_rate_drop=None, length_growth=None, throughput=None, not_finite=False
    )  # fmt: skip
    worst = records(
        kl=[900.0] * 20 + [None] * 20, entropy=[2.0] * 10 + [0.0] * 30, eos=[1.0] * 10 + [0.0] * 30,
        speed=[1000.0] * 20 + [1.0] * 20, reward=list(range(40)), spread=[1.0] * 40, length=list(range(1, 41)),
    )  # fmt: skip
    assert {alert.name for alert in fired(worst)} == {
        "kl_high", "entropy_collapse", "eos_falling", "throughput_collapse", "longer_for_reward", "not_finite",
    }  # fmt: skip
    assert fired(worst, off) == []


@pytest.mark.parametrize(
    "wrong", [{"kl": 0.0}, {"entropy": 1.0}, {"window": 9}, {"window": 10, "first_steps": 11}, {"k": 1}]
)
def test_limits_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValidationError, match="alerts.first_steps" if "first_steps" in wrong else next(iter(wrong))):
        AlertsConfig(**wrong)


# seed 0 of configs/quickstart.yaml: response length, reward, its spread, entropy, KL
QUICKSTART = {
    "length": [22, 25, 28, 30, 32, 33, 35, 36, 36.5, 39.8, 38.7, 38.5, 37.9, 37.6, 37.9, 37.9, 38.4, 38.0, 38.2, 38.7],
    "reward": [0, 0.4, 0.8, 1, 1.3, 1.4, 1.6, 1.6, 1.6, 1.7, 1.7, 1.7, 1.8, 1.7, 1.75, 1.73, 1.76, 1.8, 1.8, 1.8],
    "entropy": [0.33, 0.29, 0.25, 0.22, 0.2, 0.18, *[0.17] * 3, 0.16, 0.15, 0.14, 0.13, *[0.12] * 3, *[0.11] * 4],
    "kl": [0, 0.2, 0.6, 1.2, 2.2, 2.4, 3.2, 3.3, 3.8, 5.7, 5.1, 4.7, 4.5, 4.4, 4.5, 4.5, 4.7, 4.6, 4.7, 4.9],
}


def test_a_healthy_run_is_left_alone():
    """As the quickstart goes: the reward grows, and so do the answers, from 22 to 39 tokens."""
    assert fired(records(**QUICKSTART, spread=[0.3] * 20)) == []


def test_a_resumed_run_has_the_same_alert_state():
    """The state after any prefix, folded again, goes on with the same alerts."""
    steps = records(kl=[10, 60, 60, 60, 60, 10, 10, 10, 70, 70, 70])
    whole = fired(steps)
    for at in range(len(steps)):
        state, rest = replay(steps[:at], CONFIG), []
        for record in steps[at:]:
            state, new = advance(state, record, CONFIG)
            rest += new
        assert rest == [alert for alert in whole if alert.step > at]


def test_events_tell_the_same_after_a_crash(tmp_path):
    """An alert of a step that a crash took back is withdrawn, and begins again with the step."""
    folder = RunFolder(tmp_path / "run")
    steps = records(kl=[60] * 5)
    with EventLog(folder.events) as events:
        log = AlertLog(CONFIG, folder, events, [])
        assert [alert.step for record in steps for alert in log.observe(record)] == [3]
        log = AlertLog(CONFIG, folder, events, steps[:4])
        assert log.observe(steps[4]) == () and len(read_events(folder.events)) == 1, "it is known, and no news"
        log = AlertLog(CONFIG, folder, events, steps[:2])
        assert [alert.ended_at for alert in raised_alerts(read_events(folder.events))] == [3]
        assert [alert.step for record in steps[2:] for alert in log.observe(record)] == [3]
    assert [(a.step, a.ended_at) for a in raised_alerts(read_events(folder.events))] == [(3, 3), (3, None)]
