"""What is said of rollouts that could not be scored."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_ray.errors import InputError


class RewardError(InputError, RuntimeError):
    """A source of reward failed on some rollouts."""

    def __init__(self, source: str, reason: str, rollout_ids: Sequence[str]) -> None:
        super().__init__(source, reason, tuple(rollout_ids))
        self.source, self.reason, self.rollout_ids = source, reason, tuple(rollout_ids)

    def __str__(self) -> str:
        shown = ", ".join(self.rollout_ids[:3]) + (", …" if len(self.rollout_ids) > 3 else "")
        return f"reward source {self.source!r}: {self.reason} (rollouts {shown})"


class ServiceError(InputError, RuntimeError):
    """A service gave no answer that can be used; the message says what it did instead, without any key."""


class Unreadable(ValueError):
    """An answer that arrived and does not say what was asked for. `text` is what a judge wrote, where there is a text."""

    def __init__(self, reason: str, text: str | None = None) -> None:
        super().__init__(reason)
        self.text = text
