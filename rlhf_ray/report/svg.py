"""Draws charts as inline SVG: lines with their spread, stacked areas, intervals. Colours come from the page's style sheet.

Invariants: every text in the markup is escaped; the markup contains no address; a chart is readable without JavaScript, which
only shows the values under the pointer, from the `data-hover` attribute.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from markupsafe import Markup

from rlhf_ray.report.curves import Curve, ticks
from rlhf_ray.telemetry.console import compact, figure

WIDTH, HEIGHT = 400, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 392, 10, 164
"""Frame of the plot inside the picture, in units of the picture (about pixels)."""
Value = TypeVar("Value", float, np.ndarray)


@dataclass(frozen=True)
class Line:
    """One curve of a chart. `colour` is the index of the colour `--series-N` in the style sheet."""

    label: str
    curve: Curve
    colour: int


@dataclass(frozen=True)
class _Scale:
    """Maps values in [low, high] to [start, end] in the picture."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: Value) -> Value:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def line_chart(title: str, lines: Sequence[Line], unit: str) -> Markup:
    """Draw curves with common axes. `unit` is as in the catalogue of metrics."""
    x = _step_scale(np.concatenate([line.curve.steps for line in lines]))
    low = min(line.curve.low.min() for line in lines)
    high = max(line.curve.high.max() for line in lines)
    y = _value_scale(float(low), float(high), 1.0 if unit == "%" and high <= 1 else math.inf)
    body = [_grid(x, y, unit)]
    for line in lines:
        steps = x(line.curve.steps)
        colour = f"var(--series-{line.colour})"
        if (line.curve.low < line.curve.high).any():
            band = _points(steps, y(line.curve.high)) + " " + _points(steps[::-1], y(line.curve.low)[::-1])
            body.append(Markup('<polygon points="{}" fill="{}" opacity=".18"/>').format(band, colour))
        body.append(_stroke(steps, y(line.curve.mean), colour))
    hover = [
        _hover(
            line.label,
            x(line.curve.steps),
            line.curve.steps,
            y(line.curve.mean),
            [figure(value, unit) for value in line.curve.mean],
            line.colour,
        )
        for line in lines
    ]
    return _picture(title, body, hover)


def stacked_chart(
    title: str, steps: np.ndarray, labels: Sequence[str], layers: np.ndarray, total: np.ndarray
) -> Markup:
    """Draw `layers` [L, M] in seconds on top of each other over `steps` [M], and `total` [M] as a dotted line."""
    if len(steps) == 1:  # an area needs a width
        steps, layers, total = steps + np.array([-0.3, 0.3]), layers.repeat(2, axis=1), total.repeat(2)
    tops = np.cumsum(layers, axis=0)
    x = _step_scale(steps)
    y = _value_scale(0.0, float(max(tops.max(), total.max())))
    across = np.concatenate([x(steps), x(steps)[::-1]])
    body, hover = [_grid(x, y, "s")], []
    floor = np.zeros_like(steps)
    for colour, (label, layer, top) in enumerate(zip(labels, layers, tops, strict=True), start=1):
        outline = _points(across, y(np.concatenate([top, floor[::-1]])))
        body.append(Markup('<polygon points="{}" fill="var(--series-{})" opacity=".85"/>').format(outline, colour))
        hover.append(_hover(label, x(steps), steps, y(top), [figure(value, "s") for value in layer], colour))
        floor = top
    body.append(_stroke(x(steps), y(total), "var(--ink)", dashes="1 3.5"))
    hover.append(_hover("step", x(steps), steps, y(total), [figure(value, "s") for value in total], 0))
    return _picture(title, body, hover)


def calibration_chart(title: str, points: Sequence[tuple[float, float]]) -> Markup:
    """Draw accuracy over confidence for (confidence, accuracy) points, and the diagonal on which they agree."""
    low = min(0.4, *(value for point in points for value in point))
    x, y = _Scale(low, 1.0, LEFT, RIGHT), _Scale(low, 1.0, BOTTOM, TOP)
    across = np.asarray([point[0] for point in points])
    up = np.asarray([point[1] for point in points])
    corners = np.asarray([low, 1.0])
    dot = Markup('<circle cx="{:.1f}" cy="{:.1f}" r="3.5" fill="var(--series-1)"/>')
    body = [
        _grid(x, y, "%", "%"),
        _stroke(x(corners), y(corners), "var(--ink)", dashes="1 3.5"),
        _stroke(x(across), y(up), "var(--series-1)"),
        *(dot.format(x(a), y(b)) for a, b in points),
    ]
    return _picture(title, body, [])


def interval_chart(title: str, shares: Mapping[str, tuple[float, float, float]]) -> Markup:
    """Draw shares (low, value, high) as points with intervals, one per row; a line marks one half.

    Labels in quotes are simple rules for comparison; they get the second colour.
    """
    x = _Scale(min(0.4, *(low for low, _, _ in shares.values())), 1.0, LEFT, RIGHT)
    rows = np.linspace(TOP, BOTTOM, len(shares) + 2)[1:-1]
    y = _Scale(0.0, 1.0, BOTTOM, TOP)
    row = Markup(
        '<line x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}" stroke="var(--series-{})" stroke-width="6" opacity=".35"/>'
        '<circle cx="{:.1f}" cy="{:.1f}" r="4.5" fill="var(--series-{})"/><text x="{:.1f}" y="{:.1f}" >{}</text>'
    )
    body = [
        _grid(x, y, None, "%"),
        _stroke(np.full(2, x(0.5)), np.asarray([TOP, BOTTOM]), "var(--ink)", dashes="1 3.5"),
    ]
    for at, (label, (low, value, high)) in zip(rows, shares.items(), strict=True):
        colour = 2 if label.startswith("“") else 1
        body.append(row.format(x(low), x(high), at, at, colour, x(value), at, colour, LEFT, at - 9, label))
    return _picture(title, body, [])


def _picture(title: str, body: Sequence[Markup], hover: Sequence[dict[str, object]]) -> Markup:
    return Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}" data-hover="{}">{}'
        '<line class="cursor" y1="{}" y2="{}"/><g class="dots"></g></svg>'
    ).format(WIDTH, HEIGHT, title, json.dumps(hover), Markup("").join(body), TOP, BOTTOM)


def _grid(x: _Scale, y: _Scale, unit: str | None, x_unit: str | None = None) -> Markup:
    """Grid lines and labels of both axes. With `unit` None the y axis has none; with `x_unit` None the x axis counts steps."""
    rule = Markup(
        '<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/><text x="{}" y="{:.1f}" class="y">{}</text>'
    )
    mark = Markup('<text x="{:.1f}" y="{}" class="x">{}</text>')
    values = []
    if unit is not None:
        values = [
            rule.format(LEFT, RIGHT, y(value), y(value), LEFT - 6, y(value) + 3.5, _tick_label(value, unit))
            for value in ticks(y.low, y.high)
        ]
    across = ticks(x.low, x.high, 5)
    if x_unit is None:
        across = [step for step in dict.fromkeys(round(tick) for tick in across) if x.low <= step <= x.high]
    labels = (compact(at) if x_unit is None else _tick_label(at, x_unit) for at in across)
    marks = [mark.format(x(at), BOTTOM + 16, label) for at, label in zip(across, labels, strict=True)]
    return Markup("").join(values + marks)


def _tick_label(value: float, unit: str) -> str:
    return f"{100 * value:.3g}%".replace("-", "−") if unit == "%" else compact(value)


def _stroke(xs: np.ndarray, ys: np.ndarray, colour: str, dashes: str = "none") -> Markup:
    if len(xs) == 1:
        return Markup('<circle cx="{:.1f}" cy="{:.1f}" r="3.5" fill="{}"/>').format(xs[0], ys[0], colour)
    return Markup('<polyline points="{}" stroke="{}" stroke-dasharray="{}"/>').format(_points(xs, ys), colour, dashes)


def _points(xs: np.ndarray, ys: np.ndarray) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))


def _hover(
    label: str, xs: np.ndarray, steps: np.ndarray, ys: np.ndarray, texts: Sequence[str], colour: int
) -> dict[str, object]:
    return {
        "label": label,
        "colour": colour,
        "x": [round(float(x), 1) for x in xs],
        "y": [round(float(y), 1) for y in ys],
        "step": [int(step) for step in steps],
        "text": list(texts),
    }


def _step_scale(steps: np.ndarray) -> _Scale:
    low, high = float(steps.min()), float(steps.max())
    return _Scale(low, high, LEFT, RIGHT) if low < high else _Scale(low - 1, high + 1, LEFT, RIGHT)


def _value_scale(low: float, high: float, ceiling: float = math.inf) -> _Scale:
    """A y axis with a margin around the values. It starts at 0 if they are positive and not far from 0, and ends at `ceiling`,
    which a share cannot exceed, at the latest."""
    if 0 <= low < 0.5 * high:
        low = 0.0
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return _Scale(low if low == 0 else low - margin, min(high + margin, ceiling), BOTTOM, TOP)
