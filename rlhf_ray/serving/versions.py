"""The versions of an endpoint and their shares of the traffic: publish, promote and roll back as a pure state machine.

Invariants: there is always a stable version; at most two versions are alive, so an endpoint needs at most twice the memory of
one; a caller who sends a user name gets answers from the same version as long as the share does not change.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

from rlhf_ray.errors import InputError


class VersionError(InputError, ValueError):
    """The requested change does not fit the current versions."""


RESERVED = ("gateway", "reward-model")
"""Names of the other applications of an endpoint, which a version cannot have."""


@dataclass(frozen=True)
class Version:
    """A policy that an endpoint serves."""

    name: str
    """Name that clients see."""
    folder: str
    """Hugging Face folder, or `URI#name` for a model of a run on a store."""

    def __post_init__(self) -> None:
        if self.name in RESERVED:
            raise VersionError(
                f"a version cannot be named {self.name!r}: {' and '.join(RESERVED)} are reserved for other parts of an "
                "endpoint; choose another name with --label"
            )


@dataclass(frozen=True)
class Versions:
    """The versions of an endpoint and the traffic of each."""

    stable: Version
    """The version that gets the traffic, except for the candidate's share."""
    candidate: Version | None = None
    """A new version that gets a share of the traffic."""
    share: float = 0.0
    """The candidate's share of the traffic, between 0 and 1."""
    previous: Version | None = None
    """The stable version before this one. Its engines keep running, so that a rollback is immediate."""

    @property
    def alive(self) -> tuple[Version, ...]:
        """The versions whose engines run."""
        return tuple(version for version in (self.stable, self.candidate, self.previous) if version is not None)

    def published(self, version: Version, share: float = 1.0) -> Versions:
        """Add a version with a share of the traffic, or with all of it. Only this and the stable version stay alive.

        Raises:
            VersionError: a version of this name is alive, or the share is not above 0 and at most 1.
        """
        if not 0 < share <= 1:
            raise VersionError(f"the share is {share:g}; it must be above 0 and at most 1")
        if version.name in {alive.name for alive in self.alive}:
            raise VersionError(
                f"a version named {version.name!r} is being served; give this one another name with --label"
            )
        if share == 1:
            return Versions(version, previous=self.stable)
        return Versions(self.stable, version, share)

    def promoted(self) -> Versions:
        """Make the candidate the stable version.

        Raises:
            VersionError: there is no candidate.
        """
        if self.candidate is None:
            raise VersionError(f"there is no candidate to promote; {self.stable.name!r} has all the traffic")
        return Versions(self.candidate, previous=self.stable)

    def rolled_back(self) -> Versions:
        """Remove the candidate; if there is none, return to the previous version.

        Raises:
            VersionError: there is no candidate and no previous version.
        """
        if self.candidate is not None:
            return Versions(self.stable)
        if self.previous is None:
            raise VersionError(f"there is no version to roll back to; {self.stable.name!r} is the only one")
        return Versions(self.previous, previous=self.stable)

    def choose(self, draw: float) -> Version:
        """The version that answers a request. `draw` is uniform in [0, 1)."""
        return self.candidate if self.candidate is not None and draw < self.share else self.stable

    def named(self, name: str) -> Version | None:
        """The alive version of this name, if there is one."""
        return next((version for version in self.alive if version.name == name), None)

    def as_dict(self) -> dict[str, Any]:
        """As values that JSON can represent."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Versions:
        """Inverse of `as_dict`."""
        candidate, previous = (
            None if values[key] is None else Version(**values[key]) for key in ("candidate", "previous")
        )
        return cls(Version(**values["stable"]), candidate, values["share"], previous)


def draw_of(caller: str) -> float:
    """A number in [0, 1): always the same for one caller, uniform over callers."""
    digest = hashlib.blake2b(caller.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
