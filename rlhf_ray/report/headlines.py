"""The cards at the top of the report with the results of the evaluation, and the section on the quality of the reward model.

Invariant: a figure that was not measured is shown as missing, with the reason if it is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_ray.report.charts import Card, LegendEntry, Section
from rlhf_ray.report.svg import calibration_chart, interval_chart
from rlhf_ray.telemetry.console import compact, duration, figure

STAGE_NAMES = {"data": "data", "sft": "SFT", "reward_model": "reward model", "ppo": "PPO", "evaluation": "evaluation"}
_MAX_SHOWN = 8
"""Number of annotators and groups that are shown."""
POLICY_NAMES = {"base": "base", "sft": "SFT", "ppo": "PPO"}


@dataclass(frozen=True)
class Bar:
    """A labelled bar in the small diagram of a card, in per cent of its width."""

    label: str
    text: str
    start: float
    width: float
    colour: str
    """Name of a colour in the style sheet."""


@dataclass(frozen=True)
class Headline:
    """One card at the top of the page."""

    label: str
    value: str
    """`—` if it was not measured."""
    detail: str
    kind: str = "plain"
    """How `bars` are drawn: `interval` on one scale from 0 to 100 %, `rows` one per line, `stack` one after another."""
    bars: tuple[Bar, ...] = ()


def headlines(evaluation: Mapping[str, Any] | None) -> list[Headline]:
    """The cards for the content of evaluation.json; none if it is None."""
    if evaluation is None:
        return []
    cards = (_win_rate, _utility, _kl, _reward_model, _seconds)
    return [card(evaluation) for card in cards]


def _win_rate(evaluation: Mapping[str, Any]) -> Headline:
    label, rate = "Win rate against SFT", evaluation.get("win_rate_vs_sft")
    if rate is None:
        return Headline(label, "—", "Not measured in this run.")
    interval = evaluation.get("win_rate_interval")
    if not interval or None in interval:
        return Headline(label, figure(rate, "%"), "Held-out prompts; no interval was computed.", "interval")
    low, high = interval
    span = f"{figure(low, '%')} to {figure(high, '%')}"
    detail = (
        f"Held-out prompts; 95\N{NARROW NO-BREAK SPACE}% interval {span}. 50\N{NARROW NO-BREAK SPACE}% would be a draw."
    )
    bars = (
        Bar("interval", "", 100 * low, max(100 * (high - low), 0.6), "ppo"),
        Bar("rate", "", 100 * rate, 0, "ppo"),
    )
    return Headline(label, figure(rate, "%"), detail, "interval", bars)


def _utility(evaluation: Mapping[str, Any]) -> Headline:
    label = "Hidden utility"
    known = {name: value for name, value in (evaluation.get("utility") or {}).items() if value is not None}
    if not known:
        return Headline(label, "—", "Unknown: only a simulated annotator has a known utility.")
    value, detail = figure(known.get("ppo")), "True value of the answers, which no model has seen."
    spread = evaluation.get("utility_std_sft")
    if spread and {"sft", "ppo"} <= known.keys():
        gain = (known["ppo"] - known["sft"]) / spread
        detail = f"{compact(abs(gain))} standard deviations {'above' if gain >= 0 else 'below'} SFT. {detail}"
    low, high = min(0.0, *known.values()), max(0.0, *known.values())
    scale = 100 / (high - low or 1.0)
    bars = tuple(
        Bar(POLICY_NAMES.get(name, name), figure(worth), (min(worth, 0) - low) * scale, abs(worth) * scale, name)
        for name, worth in known.items()
    )
    return Headline(label, value, detail, "rows", bars)


def _kl(evaluation: Mapping[str, Any]) -> Headline:
    value = evaluation.get("kl_sequence")
    if value is None:
        return Headline("KL to the reference", "—", "Not measured in this run.")
    return Headline(
        "KL to the reference", figure(value, "nats"), "Per response: how far the policy moved away from SFT."
    )


def _reward_model(evaluation: Mapping[str, Any]) -> Headline:
    label = "Reward model accuracy"
    accuracy, ceiling = evaluation.get("reward_model_accuracy"), evaluation.get("reward_model_accuracy_ceiling")
    if accuracy is None:
        return Headline(label, "—", "Not measured in this run.")
    if not ceiling:
        detail = "Held-out pairs. The limit set by the annotators' noise is unknown."
        return Headline(label, figure(accuracy, "%"), detail, "rows", (_share("model", accuracy, "ppo"),))
    detail = f"Held-out pairs: {figure(accuracy / ceiling, '%')} of the limit set by the annotators' noise."
    bars = (_share("model", accuracy, "ppo"), _share("ceiling", ceiling, "base"))
    return Headline(label, figure(accuracy, "%"), detail, "rows", bars)


def _share(label: str, share: float, colour: str) -> Bar:
    return Bar(label, figure(share, "%"), 0, 100 * share, colour)


def _seconds(evaluation: Mapping[str, Any]) -> Headline:
    known = {stage: value for stage, value in (evaluation.get("seconds") or {}).items() if value is not None}
    total = sum(known.values())
    if not total:
        return Headline("Time", "—", "Not recorded in this run.")
    bars, start = [], 0.0
    for index, (stage, value) in enumerate(known.items(), start=1):
        width = 100 * value / total
        bars.append(
            Bar(STAGE_NAMES.get(stage, stage.replace("_", " ")), duration(value), start, width, f"series-{index}")
        )
        start += width
    return Headline("Time", duration(total), "Wall time of all stages.", "stack", tuple(bars))


def quality_section(quality: Mapping[str, Any] | None) -> list[Section]:
    """The section on the content of quality.json; none if it is None."""
    if quality is None:
        return []
    lead = (
        "On held-out labels. A model that only prefers length is good where the longer answer is better, and bad where it "
        "is not."
    )
    cards = [_comparisons_card(quality), _calibration_card(quality)]
    if quality["groups"]:
        cards.append(_annotators_card(quality["groups"], "Groups of annotators"))
    if quality["annotators"]:
        cards.append(_annotators_card(quality["annotators"], "Annotators"))
    return [Section("How far the reward model can be trusted", lead, tuple(cards), ())]


def _comparisons_card(quality: Mapping[str, Any]) -> Card:
    rule = "longer is better" if quality["longer_is_better"] else "shorter is better"
    shares = {
        "reward model": quality["accuracy"],
        f"“{rule}”": quality["length_baseline"],
        "where longer is better": quality["accuracy_when_longer_is_better"],
        "where shorter is better": quality["accuracy_when_shorter_is_better"],
    }
    known = {label: share for label, share in shares.items() if share is not None}
    legend = tuple(
        LegendEntry(
            label, f"{figure(share['value'], '%')} of {share['count']:,}", 2 if label.startswith("“") else 1, ""
        )
        for label, share in known.items()
    )
    correlation = quality["reward_length_correlation"]
    note = "95 % intervals." + (
        "" if correlation is None else f" Reward and length correlate with {figure(correlation)}."
    )
    if quality["members"] > 1:
        apart = figure(quality["disagreement"])
        note += f" The mean of {quality['members']} members, which differ by {apart} standard deviations."
    intervals = {label: (share["low"], share["value"], share["high"]) for label, share in known.items()}
    return Card(
        "Comparisons ordered correctly", interval_chart("Comparisons ordered correctly", intervals), legend, note
    )


def _annotators_card(shares: Mapping[str, Any], title: str) -> Card:
    """The annotators or groups with the lowest agreement; it measures the model and not the person."""
    worst = sorted(shares.items(), key=lambda item: item[1]["value"])[:_MAX_SHOWN]
    legend = tuple(
        LegendEntry(name, f"{figure(share['value'], '%')} of {share['count']:,}", 1, "") for name, share in worst
    )
    note = "How often the model orders answers as they do; 95 % intervals."
    if len(shares) > _MAX_SHOWN:
        note += f" The lowest {_MAX_SHOWN} of {len(shares)}; quality.json lists all."
    intervals = {name: (share["low"], share["value"], share["high"]) for name, share in worst}
    return Card(title, interval_chart(title, intervals), legend, note)


def _calibration_card(quality: Mapping[str, Any]) -> Card:
    points = [(b["confidence"], b["accuracy"]) for b in quality["calibration"]]
    error = figure(quality["expected_calibration_error"], "%")
    legend = (LegendEntry("expected calibration error", error, 1, "mean distance from the diagonal"),)
    note = "Each point is a tenth of the comparisons: how sure the model was, and how often it was right."
    return Card("Calibration", calibration_chart("Calibration", points), legend, note)
