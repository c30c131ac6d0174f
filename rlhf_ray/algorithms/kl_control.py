"""The KL coefficient beta as a pure state machine: fixed, or steered towards a target.

Invariant: an update returns a new controller and the state survives `controller_from_dict(c.to_dict()) == c`, so that a
resumed run goes on with the beta it had.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

MAX_RELATIVE_ERROR = 0.2


@dataclass(frozen=True)
class FixedKL:
    """A coefficient that never changes."""

    beta: float

    def update(self, kl: float, episodes: int) -> FixedKL:
        """Itself, whatever was observed."""
        return self

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "fixed", **asdict(self)}


@dataclass(frozen=True)
class AdaptiveKL:
    """`beta *= 1 + clip(kl / target - 1, -0.2, 0.2) * episodes / horizon` (arXiv 1909.08593, section 2.2)."""

    beta: float
    target: float
    """Wanted KL per sequence, nats."""
    horizon: float = 10_000.0
    """Episodes after which an error of 20 % has changed beta by about that much."""

    def __post_init__(self) -> None:
        for name in ("beta", "target", "horizon"):
            if not getattr(self, name) > 0.0:
                raise ValueError(
                    f"AdaptiveKL.{name}={getattr(self, name)} must be > 0; use FixedKL for a constant beta"
                )

    def update(self, kl: float, episodes: int) -> AdaptiveKL:
        """The controller after a batch of `episodes` sequences whose mean token-summed k1 was `kl`, nats."""
        error = min(max(kl / self.target - 1.0, -MAX_RELATIVE_ERROR), MAX_RELATIVE_ERROR)
        return replace(self, beta=self.beta * (1.0 + error * episodes / self.horizon))

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "adaptive", **asdict(self)}


KLController = FixedKL | AdaptiveKL

_KINDS: dict[str, type[FixedKL | AdaptiveKL]] = {"fixed": FixedKL, "adaptive": AdaptiveKL}


def controller_from_dict(state: dict[str, Any]) -> KLController:
    """The controller that `to_dict` described. Raises ValueError for an unknown kind."""
    kind = state.get("kind")
    if kind not in _KINDS:
        raise ValueError(f"KL controller of kind {kind!r} in the checkpoint; allowed: {', '.join(_KINDS)}")
    return _KINDS[kind](**{name: value for name, value in state.items() if name != "kind"})
