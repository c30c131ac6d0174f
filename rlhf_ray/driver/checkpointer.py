"""Checkpoints of a run: the learners' state and what the driver remembers, in one folder (`runs.atomic_checkpoint`).

DeepSpeed's files are pickles: load only checkpoints you trust.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.algorithms.kl import AdaptiveKL, FixedKL, KLController, controller_from_dict
from rlhf_ray.config.algorithm import KLConfig
from rlhf_ray.driver.buffer import Admission
from rlhf_ray.runs import atomic_checkpoint
from rlhf_ray.runs.atomic_checkpoint import NotACheckpoint

STATE = "state.json"


@dataclass(frozen=True)
class RunState:
    """What the driver must remember beside the learners' own state."""

    step: int
    """PPO steps done; also the policy version."""
    next_group: int
    """Cursor into the prompt source; groups are a function of it (epoch, order, seeds)."""
    kl: dict[str, Any]
    """State of the KL controller."""
    config_sha256: str
    """Fingerprint of the resolved config."""
    unfinished: Sequence[int] = ()
    """Groups before the cursor that were neither trained nor given up."""


async def save(folder: Path, state: RunState, write_roles: Callable[[Path], Awaitable[None]], keep: int) -> Path:
    """Write `folder/step_N`; remove all but the newest `keep`.

    Args:
        write_roles: writes the learners' files below the path it is given.
    """
    temporary = atomic_checkpoint.begin(folder, state.step)
    await write_roles(temporary)
    (temporary / STATE).write_text(json.dumps(asdict(state)))
    # Reading and hashing gigabytes must not stop the event loop, in which rollouts arrive.
    final = await asyncio.to_thread(atomic_checkpoint.seal, temporary)
    atomic_checkpoint.keep_newest(folder, keep, up_to=state.step)
    return final


def load_state(checkpoint: Path) -> RunState:
    """Check a checkpoint against its manifest and read the driver's state.

    Raises:
        NotACheckpoint: naming the folder and what is missing or differs.
    """
    atomic_checkpoint.verify(checkpoint, STATE)
    try:
        fields = json.loads((checkpoint / STATE).read_text())
        return RunState(**fields | {"unfinished": tuple(fields.get("unfinished", ()))})
    except (ValueError, TypeError) as error:
        raise NotACheckpoint(f"checkpoint {checkpoint} is of another version: {error}") from error


def newest(folder: Path, on_damaged: Callable[[str], None]) -> tuple[Path, RunState] | None:
    """The newest checkpoint that passes its check, as `atomic_checkpoint.newest`."""
    return atomic_checkpoint.newest(folder, load_state, on_damaged)


def fingerprint(config_text: str) -> str:
    """SHA-256 of a resolved config."""
    return hashlib.sha256(config_text.encode()).hexdigest()


@dataclass(frozen=True)
class TrainingState:
    """Step number and KL controller."""

    step: int
    """PPO steps done; also the version of the policy they made."""
    next_group: int
    """Cursor into the prompt source: the first group that was never admitted."""
    kl: KLController
    unfinished: tuple[int, ...] = ()
    """Groups before the cursor that were neither trained nor given up (with staleness 0 there are none)."""

    @classmethod
    def initial(cls, kl: KLConfig) -> TrainingState:
        """Of a run that starts."""
        adaptive = kl.target is not None
        return cls(0, 0, AdaptiveKL(kl.coefficient, kl.target, kl.horizon) if adaptive else FixedKL(kl.coefficient))

    @classmethod
    def restored(cls, saved: RunState) -> TrainingState:
        """Of a run that goes on."""
        return cls(saved.step, saved.next_group, controller_from_dict(saved.kl), tuple(saved.unfinished))

    def saved(self, config_sha256: str) -> RunState:
        """For a checkpoint."""
        return RunState(self.step, self.next_group, self.kl.to_dict(), config_sha256, self.unfinished)

    def advance(
        self, kl: float | None, episodes: int, next_group: int, unfinished: tuple[int, ...] = ()
    ) -> TrainingState:
        """After a step on a batch of `episodes` sequences with that mean sequence KL (None: not measured)."""
        controller = self.kl if kl is None else self.kl.update(kl, episodes)
        return TrainingState(self.step + 1, next_group, controller, unfinished)

    def admission(self, groups_per_batch: int, staleness: int, attempts: int = 1) -> Admission:
        """Admission that goes on where this state is; what was in flight is generated again, with the same seeds."""
        return Admission(
            groups_per_batch, staleness, self.step, self.next_group, accepted=self.step * groups_per_batch,
            attempts=attempts, again=self.unfinished,
        )  # fmt: skip
