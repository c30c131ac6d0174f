"""How often one thing beats another, with the interval of that share. Pure.

Invariants: a difference is "ours minus theirs"; one of exactly zero counts as half won, so that comparing a thing with itself
gives one half.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

Z_95 = 1.959964


@dataclass(frozen=True)
class Share:
    """How often something holds, with the 95 % interval of Wilson (JASA 1927)."""

    value: float
    low: float
    high: float
    count: int
    """Cases behind it."""


def win_rate(ours: np.ndarray, theirs: np.ndarray) -> Share | None:
    """Share of prompts on which `ours` is higher, both float64 [P]. A NaN on either side leaves the prompt out; None: all."""
    differences = ours - theirs
    known = differences[~np.isnan(differences)]
    return ordered(known) if len(known) else None


def ordered(differences: np.ndarray) -> Share:
    """The share of differences that are positive; [c], c ≥ 1."""
    won = float((differences > 0).sum() + 0.5 * (differences == 0).sum())
    return wilson(won, len(differences))


def wilson(successes: float, count: int) -> Share:
    """A share and its interval, by inverting the normal test: `(p + z²/2n ± z√(p(1−p)/n + z²/4n²)) / (1 + z²/n)`."""
    share, z2 = successes / count, Z_95**2 / count
    centre = (share + z2 / 2) / (1 + z2)
    half = Z_95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count)) / (1 + z2)
    return Share(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)), count)
