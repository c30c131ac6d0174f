"""Checkpoints of a run: the driver's state, the learners and the hooks, in one folder (`runs.atomic_checkpoint`).

DeepSpeed's files are pickles: load only checkpoints you trust.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.algorithms.kl import AdaptiveKL, FixedKL, KLController, controller_from_dict
from rlhf_ray.config.algorithm import KLConfig
from rlhf_ray.driver.buffer import Admission
from rlhf_ray.driver.hooks import LoopHook
from rlhf_ray.learner.group import LearnerGroup
from rlhf_ray.runs import atomic_checkpoint
from rlhf_ray.runs.atomic_checkpoint import NotACheckpoint

STATE = "state.json"
_FINGERPRINT = "config_sha256"


@dataclass(frozen=True)
class TrainingState:
    """What the driver must remember between steps, besides the learners' own state."""

    step: int
    """PPO steps done; also the version of the policy."""
    next_group: int
    """Cursor into the prompt source: the first group that was never admitted."""
    kl: KLController
    unfinished: tuple[int, ...] = ()
    """Groups before the cursor that were neither trained nor dropped; none with a staleness of 0."""

    @classmethod
    def initial(cls, kl: KLConfig) -> TrainingState:
        """The state before the first step."""
        if kl.target is None:
            return cls(0, 0, FixedKL(kl.coefficient))
        return cls(0, 0, AdaptiveKL(kl.coefficient, kl.target, kl.horizon))

    def advance(
        self, kl: float | None, episodes: int, next_group: int, unfinished: tuple[int, ...] = ()
    ) -> TrainingState:
        """The state after a step on a batch of `episodes` sequences with that mean sequence KL (None: not measured)."""
        controller = self.kl if kl is None else self.kl.update(kl, episodes)
        return TrainingState(self.step + 1, next_group, controller, unfinished)

    def admission(self, groups_per_batch: int, staleness: int, attempts: int = 1) -> Admission:
        """Admission that continues from this state; unfinished groups are generated again, with the same seeds."""
        return Admission(
            groups_per_batch, staleness, self.step, self.next_group, accepted=self.step * groups_per_batch,
            attempts=attempts, again=self.unfinished,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """The content of `state.json`."""
        return {
            "step": self.step, "next_group": self.next_group, "kl": self.kl.to_dict(), "unfinished": self.unfinished
        }  # fmt: skip

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TrainingState:
        """The inverse of `to_dict`. Checkpoints of older versions have no `unfinished`."""
        converted = {"kl": controller_from_dict(fields["kl"]), "unfinished": tuple(fields.get("unfinished", ()))}
        return cls(**{**fields, **converted})


class Checkpointer:
    """Saves and restores everything that a run needs to continue."""

    def __init__(
        self,
        folder: Path,
        learners: Mapping[str, LearnerGroup],
        hooks: LoopHook,
        keep: int,
        config_sha256: str,
        push: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            folder: the run's folder of checkpoints.
            learners: by role, the policy's among them.
            keep: number of newest checkpoints that are kept.
            config_sha256: fingerprint of the resolved config, written for people.
            push: copies the run's folder to a store and returns when it is there.
        """
        self.folder, self.learners, self.hooks = folder, learners, hooks
        self.keep, self.config_sha256, self.push = keep, config_sha256, push

    async def save(self, state: TrainingState) -> Path:
        """Write `step_N` with its manifest, and remove older checkpoints than the newest `keep`; returns the folder."""
        temporary = atomic_checkpoint.begin(self.folder, state.step)
        for role, learner in self.learners.items():
            await learner.save_checkpoint(temporary / f"{role}_learner")
        await self.learners["policy"].save_pretrained(temporary / "policy")
        await self.hooks.save(temporary)
        (temporary / STATE).write_text(json.dumps({**state.to_dict(), _FINGERPRINT: self.config_sha256}))
        # Reading and hashing gigabytes must not stop the event loop, in which rollouts arrive.
        final = await asyncio.to_thread(atomic_checkpoint.seal, temporary)
        atomic_checkpoint.keep_newest(self.folder, self.keep, up_to=state.step)
        return final

    async def upload(self) -> None:
        """Wait until the store has the checkpoint, if the run's folder is on a store."""
        await asyncio.to_thread(self.push)

    async def restore(self, checkpoint: Path) -> None:
        """Load the learners and the hooks from a checkpoint that `load_state` has verified."""
        for role, learner in self.learners.items():
            await learner.load_checkpoint(checkpoint / f"{role}_learner")
        await self.hooks.restore(checkpoint)


def load_state(checkpoint: Path) -> TrainingState:
    """Verify a checkpoint against its manifest and read the driver's state.

    Raises:
        NotACheckpoint: naming the folder and what is missing or differs.
    """
    atomic_checkpoint.verify(checkpoint, STATE)
    try:
        fields = json.loads((checkpoint / STATE).read_text())
        fields.pop(_FINGERPRINT, None)
        return TrainingState.from_dict(fields)
    except (ValueError, TypeError, KeyError) as error:
        raise NotACheckpoint(f"checkpoint {checkpoint} is of another version: {error}") from error


def newest(folder: Path, on_damaged: Callable[[str], None]) -> tuple[Path, TrainingState] | None:
    """The newest checkpoint that passes its check, as `atomic_checkpoint.newest`."""
    return atomic_checkpoint.newest(folder, load_state, on_damaged)


def fingerprint(config_text: str) -> str:
    """SHA-256 of a resolved config."""
    return hashlib.sha256(config_text.encode()).hexdigest()
