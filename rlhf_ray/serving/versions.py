"""Which policy answers whom: what publishing, promoting and rolling back do. A pure state machine.

Invariants: there is always a stable version; at most two versions are alive, so an endpoint needs at most twice the memory of
one; a caller who says who they are stays with one version while the share does not change.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

from rlhf_ray.errors import InputError


class VersionError(InputError, ValueError):
    """What is asked for does not fit the versions there are."""


RESERVED = ("gateway", "reward-model")
"""Parts of an endpoint beside its versions."""


@dataclass(frozen=True)
class Version:
    """One policy."""

    name: str
    folder: str
    """Hugging Face folder, or `URI#name` of a model of a run on a store."""

    def __post_init__(self) -> None:
        if self.name in RESERVED:
            raise VersionError(
                f"a version cannot be named {self.name!r}, as parts of an endpoint are ({', '.join(RESERVED)}); give it another "
                "name by --label"
            )


@dataclass(frozen=True)
class Versions:
    """The policies of an endpoint."""

    stable: Version
    candidate: Version | None = None
    """One that gets a share of the traffic."""
    share: float = 0.0
    """Of the candidate, between 0 and 1."""
    previous: Version | None = None
    """The stable one before; alive, to go back to at once."""

    @property
    def alive(self) -> tuple[Version, ...]:
        """Those with engines."""
        return tuple(version for version in (self.stable, self.candidate, self.previous) if version is not None)

    def published(self, version: Version, share: float = 1.0) -> Versions:
        """A new version, for a share of the traffic or all of it; whatever is neither it nor the stable one is retired.

        Raises:
            VersionError: a version of that name is alive, or the share is not above 0 and at most 1.
        """
        if not 0 < share <= 1:
            raise VersionError(f"a share of {share:g} is not above 0 and at most 1")
        if version.name in {alive.name for alive in self.alive}:
            raise VersionError(
                f"a version named {version.name!r} is being served; give this one another name by --label"
            )
        if share == 1:
            return Versions(version, previous=self.stable)
        return Versions(self.stable, version, share)

    def promoted(self) -> Versions:
        """The candidate becomes the stable version.

        Raises:
            VersionError: there is no candidate.
        """
        if self.candidate is None:
            raise VersionError(f"there is no candidate to promote; {self.stable.name!r} has all the traffic")
        return Versions(self.candidate, previous=self.stable)

    def rolled_back(self) -> Versions:
        """Without the candidate; where there is none, back to the previous version.

        Raises:
            VersionError: there is neither.
        """
        if self.candidate is not None:
            return Versions(self.stable)
        if self.previous is None:
            raise VersionError(f"there is nothing to go back to; {self.stable.name!r} is the only version")
        return Versions(self.previous, previous=self.stable)

    def choose(self, draw: float) -> Version:
        """Who answers; `draw` is uniform in [0, 1)."""
        return self.candidate if self.candidate is not None and draw < self.share else self.stable

    def named(self, name: str) -> Version | None:
        """The living version of that name."""
        return next((version for version in self.alive if version.name == name), None)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Versions:
        """What `as_dict` gave."""
        stable, candidate, previous = (
            None if values[key] is None else Version(**values[key]) for key in ("stable", "candidate", "previous")
        )
        return cls(stable, candidate, values["share"], previous)


def draw_of(caller: str) -> float:
    """A number in [0, 1) that is always the same for a caller, and uniform over callers."""
    digest = hashlib.blake2b(caller.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
