"""The reward model's quality as a section of the report: what it gets right, what length alone gets right, when to believe it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_ray.report.charts import Card, Key, Section
from rlhf_ray.report.figures import figure
from rlhf_ray.report.svg import calibration_chart, interval_chart

_SHOWN = 8
_LEAD = "On held-out labels. A model that follows length is good where the longer answer is better, and bad where it is not."


def quality_section(quality: Mapping[str, Any] | None) -> list[Section]:
    """One section, or none where nothing was measured."""
    if quality is None:
        return []
    cards = [_accuracy(quality), _calibration(quality)]
    if quality["groups"]:
        cards.append(_people(quality["groups"], "Groups of annotators"))
    if quality["annotators"]:
        cards.append(_people(quality["annotators"], "Annotators"))
    return [Section("How far the reward model can be trusted", _LEAD, tuple(cards), ())]


def _accuracy(quality: Mapping[str, Any]) -> Card:
    rule = "longer is better" if quality["longer_is_better"] else "shorter is better"
    shares = {
        "reward model": quality["accuracy"],
        f"“{rule}”": quality["length_baseline"],
        "where longer is better": quality["accuracy_when_longer_is_better"],
        "where shorter is better": quality["accuracy_when_shorter_is_better"],
    }
    known = {label: share for label, share in shares.items() if share is not None}
    keys = tuple(
        Key(label, f"{figure(share['value'], '%')} of {share['count']:,}", 2 if label.startswith("“") else 1, "")
        for label, share in known.items()
    )
    correlation = quality["reward_length_correlation"]
    note = "95 % intervals." + (
        "" if correlation is None else f" Reward and length correlate with {figure(correlation)}."
    )
    if quality["members"] > 1:
        apart = figure(quality["disagreement"])
        note += f" The mean of {quality['members']} members, which are {apart} standard deviations apart."
    intervals = {label: (share["low"], share["value"], share["high"]) for label, share in known.items()}
    return Card("Comparisons ordered rightly", interval_chart("Comparisons ordered rightly", intervals), keys, note)


def _people(shares: Mapping[str, Any], title: str) -> Card:
    """The `_SHOWN` that the model understands worst; a figure of one person is no judgement of them."""
    worst = sorted(shares.items(), key=lambda item: item[1]["value"])[:_SHOWN]
    keys = tuple(Key(name, f"{figure(share['value'], '%')} of {share['count']:,}", 1, "") for name, share in worst)
    note = "How often the model orders their labels as they do; 95 % intervals."
    if len(shares) > _SHOWN:
        note += f" The lowest {_SHOWN} of {len(shares)}; quality.json has all."
    intervals = {name: (share["low"], share["value"], share["high"]) for name, share in worst}
    return Card(title, interval_chart(title, intervals), keys, note)


def _calibration(quality: Mapping[str, Any]) -> Card:
    points = [(b["confidence"], b["accuracy"]) for b in quality["calibration"]]
    error = figure(quality["expected_calibration_error"], "%")
    keys = (Key("expected calibration error", error, 1, "mean distance from the diagonal"),)
    note = (
        "A point is a tenth of the comparisons: how sure the model was, and how often right. On the diagonal it knows."
    )
    return Card("Calibration", calibration_chart("Calibration", points), keys, note)
