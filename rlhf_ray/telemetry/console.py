"""What people read: the shared console, and how numbers, durations and times are formatted."""

from __future__ import annotations

from datetime import UTC, datetime

from rich.console import Console

console = Console()
"""Everything that people read goes through this console, so that progress displays and messages never interleave."""


def figure(value: float | None, unit: str = "") -> str:
    """A number with three digits and its unit. `%` shows a share in per cent; None is shown as `—`."""
    if value is None:
        return "—"
    if unit == "%":
        return f"{100 * value:.1f}\N{NARROW NO-BREAK SPACE}%".replace("-", "−")
    return compact(value) if unit in ("", "1/s") else f"{compact(value)}\N{NO-BREAK SPACE}{unit}"


def compact(value: float) -> str:
    """Three significant digits, four from 1000 on; thousands as k, M or G, very small numbers in powers of ten."""
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
    """A duration as `2h05m`, `3m07s` or `1.5s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{seconds:.1f}s"


def clock(seconds: float) -> str:
    """Seconds since the epoch as date and time in UTC."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
