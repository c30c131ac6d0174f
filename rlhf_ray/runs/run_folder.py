"""A run's folder: where everything is, who may write to it, and how a file is replaced.

Invariants: at most one process holds a folder (`RunFolder.claim`), and the claim ends with that process, however it
ends; a fresh run never starts over what another run left; a file written by `atomic_write` is seen whole or not at
all.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlhf_ray.errors import InputError

Stage = Literal["sft", "reward_model", "ppo", "evaluation"]
"""The stages of a run, in their order."""


class RunFolderError(InputError, RuntimeError):
    """A run folder cannot be used as asked."""


class RunFolderBusy(RunFolderError):
    """Another process runs in the folder."""


class RunFolderTaken(RunFolderError):
    """A fresh run was asked for in a folder that holds a run already."""


QUALITY = "quality.json"
"""In a reward model's folder: how good it is on held-out labels (`algorithms.reward_quality.RewardQuality`)."""


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run. It holds no open file, so it can be sent to the other processes of the run."""

    path: Path

    def __init__(self, path: str | Path) -> None:
        object.__setattr__(self, "path", Path(path).expanduser().absolute())

    @property
    def name(self) -> str:
        """The run's name: the last part of its path."""
        return self.path.name

    @property
    def config(self) -> Path:
        """The resolved configuration, without secrets."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object per PPO step."""
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """Faults, joins, departures, drops with reasons, checkpoints, publications."""
        return self.path / "events.jsonl"

    @property
    def samples(self) -> Path:
        """Responses of the policy in training, with their reward by source."""
        return self.path / "samples.jsonl"

    @property
    def evaluation(self) -> Path:
        """The headline figures, for programs."""
        return self.path / "evaluation.json"

    @property
    def evaluation_samples(self) -> Path:
        """Answers of the base, SFT and PPO policies to the same prompts."""
        return self.path / "evaluation_samples.jsonl"

    @property
    def report(self) -> Path:
        """The self-contained page for people."""
        return self.path / "report.html"

    @property
    def checkpoints(self) -> Path:
        """Folder of `step_N/` folders."""
        return self.path / "checkpoints"

    @property
    def sft(self) -> Path:
        """Hugging Face folder of the fine-tuned policy, and the stage's metrics."""
        return self.path / "sft"

    @property
    def reward_model(self) -> Path:
        """Hugging Face folder of the reward model, and the stage's metrics."""
        return self.path / "reward_model"

    def reward_member(self, member: int) -> Path:
        """Of an ensemble, counted from 1: the first is `reward_model`, the others are `reward_model_2`, …"""
        return self.reward_model if member == 1 else self.path / f"reward_model_{member}"

    @property
    def reward_ensemble(self) -> Path:
        """How good the ensemble is, where there is one."""
        return self.path / "reward_ensemble.json"

    @property
    def reward_quality(self) -> Path:
        """How good the reward is on held-out labels; not there for marks."""
        return self.reward_ensemble if self.reward_ensemble.is_file() else self.reward_model / QUALITY

    @property
    def policy(self) -> Path:
        """Hugging Face folder of the policy that PPO trained."""
        return self.path / "policy"

    @property
    def published(self) -> Path:
        """Versions that the run gave to an endpoint, as long as they are served."""
        return self.path / "published"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's log directory, one run per stage in it."""
        return self.path / "tensorboard"

    def stage_metrics(self, stage: str) -> Path:
        """The metrics file of a stage (`ppo`, `sft`, `reward_model_2`, …): PPO's is the run's own, others lie by their models."""
        return self.metrics if stage == "ppo" else self.path / stage / "metrics.jsonl"

    @property
    def holds_run(self) -> bool:
        """Whether a run has left anything here, finished or not."""
        marks = (self.config, self.metrics, self.checkpoints, self.sft, self.reward_model, self.policy, self.evaluation)
        return any(mark.exists() for mark in marks)

    @contextmanager
    def claim(self, resume: bool = False) -> Iterator[RunFolder]:
        """Create the folder if need be and hold it until the block or the process ends.

        `resume=True` accepts a folder that holds a run, and one that holds none: a job that its cluster restarts can
        say `--resume` always.

        Raises RunFolderBusy where another process holds the folder, and RunFolderTaken where a fresh run would start
        over an old one.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with _exclusive(self.path / "run.lock", self.path):
            if self.holds_run and not resume:
                raise RunFolderTaken(
                    f"{self.path} already holds a run. Continue it with --resume, or choose another name for this one; "
                    f"to begin again under the same name, delete or move the folder first."
                )
            yield self


def put_aside(folder: RunFolder) -> Path | None:
    """Rename a folder that holds a run to the first free of `NAME.1`, `NAME.2`, …; its new path, or None where there was none.

    Raises RunFolderBusy where a process runs in it.
    """
    if not folder.path.is_dir():
        return None
    with folder.claim(resume=True):
        number = next(n for n in itertools.count(1) if not folder.path.with_name(f"{folder.name}.{n}").exists())
        return folder.path.rename(folder.path.with_name(f"{folder.name}.{number}"))


@contextmanager
def _exclusive(lock: Path, folder: Path) -> Iterator[None]:
    # The lock file is never deleted: whoever opened it before a deletion would lock a file that nobody else can see.
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "an unknown process"
            raise RunFolderBusy(
                f"{folder} is in use by {holder}. Wait for that run to end or stop it, "
                "or choose another name for this one."
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def atomic_write(path: str | Path, data: str | bytes) -> None:
    """Replace the file at `path` by `data` (text as UTF-8), durably: after a crash it holds the old content or the new.

    The parent folder must exist. Permissions follow the umask, like those of any new file.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
