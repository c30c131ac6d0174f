"""Figures as text, and the round numbers of an axis."""

from __future__ import annotations

import math
from datetime import UTC, datetime


def figure(value: float | None, unit: str = "") -> str:
    """A figure for a person: three digits; `%` shows a share in per cent; `—` where there is none."""
    if value is None:
        return "—"
    if unit == "%":
        return f"{100 * value:.1f}\N{NARROW NO-BREAK SPACE}%".replace("-", "−")
    return compact(value) if unit in ("", "1/s") else f"{compact(value)}\N{NO-BREAK SPACE}{unit}"


def compact(value: float) -> str:
    """Three significant digits, four from 1000 on; thousands as k, M or G, very small figures in powers of ten."""
    size = abs(value)
    if size >= 1e13 or 0 < size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        text = f"{float(mantissa):g}e{int(exponent)}"
    elif size >= 1e4:
        factor, suffix = next(pair for pair in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if size >= pair[0])
        text = f"{value / factor:.4g}{suffix}"
    else:
        text = f"{value:.4g}" if size >= 1000 else f"{value:.3g}"
    return text.replace("-", "−")


def duration(seconds: float) -> str:
    """Seconds as `42 s`, `3 min 20 s` or `2 h 05 min`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left:02} min" if hours else f"{minutes} min {rest:02} s"


def clock(seconds: float) -> str:
    """Seconds since the epoch as date and time, UTC."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within [low, high], about `count` of them. Needs low <
    high."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * nice for nice in (1, 2, 5, 10) if power * nice >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]
