"""Responses that are too long: DAPO's soft punishment.

Invariant: what is returned is added to a score; it depends on the response's length and the limits only, and never rewards.
"""

from __future__ import annotations

from torch import Tensor


def soft_overlong_punishment(lengths: Tensor, max_length: int, buffer: int, penalty: float = 1.0) -> Tensor:
    """0 up to `max_length - buffer`, then linearly down to `-penalty` at `max_length` (DAPO, arXiv 2503.14476).

    `((max_length - buffer) - length) / buffer`, between -1 and 0, times `penalty`.

    Args: lengths: [B], in tokens; max_length: the response limit; buffer: its last tokens, which cost; penalty: ≥ 0.
    Returns: float [B]. Raises ValueError for a buffer outside [1, max_length] or a negative penalty.
    """
    if not 1 <= buffer <= max_length:
        raise ValueError(f"buffer={buffer} must be between 1 and max_length={max_length} tokens")
    if penalty < 0.0:
        raise ValueError(f"penalty={penalty} would reward long responses; it is subtracted, so give a value >= 0")
    excess = (lengths - (max_length - buffer)).clamp(0, buffer)
    return -penalty * excess.float() / buffer
