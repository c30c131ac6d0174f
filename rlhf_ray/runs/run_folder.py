"""A run's folder: where everything is, which process may write to it, and how a file is replaced atomically.

Invariants: at most one process holds a folder (`RunFolder.claim`), and the claim ends with that process, however it ends; a new
run never overwrites an earlier one; readers of a file that `atomic_write` wrote see all of the old or all of the new content.
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
"""The stages of a run, in order."""


class RunFolderError(InputError, RuntimeError):
    """A run folder is missing, in use, or already holds a run."""


class RunFolderBusy(RunFolderError):
    """Another process is running in the folder."""


class RunFolderTaken(RunFolderError):
    """A new run would start in a folder that already holds a run."""


QUALITY = "quality.json"
"""File in a reward model's folder: its quality on held-out labels (`algorithms.reward_quality.RewardQuality`)."""


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run. It holds no open files, so it can be sent to other processes."""

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
        """Faults, worker changes, drops with reasons, checkpoints, weight publications."""
        return self.path / "events.jsonl"

    @property
    def samples(self) -> Path:
        """Responses of the policy during training, with the reward from each source."""
        return self.path / "samples.jsonl"

    @property
    def evaluation(self) -> Path:
        """The headline figures as JSON."""
        return self.path / "evaluation.json"

    @property
    def evaluation_samples(self) -> Path:
        """Answers of the base, SFT and PPO policies to the same held-out prompts."""
        return self.path / "evaluation_samples.jsonl"

    @property
    def report(self) -> Path:
        """The self-contained HTML report."""
        return self.path / "report.html"

    @property
    def checkpoints(self) -> Path:
        """Folder that contains the `step_N/` checkpoints."""
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
        """Folder of an ensemble member, counted from 1: `reward_model`, then `reward_model_2`, …"""
        return self.reward_model if member == 1 else self.path / f"reward_model_{member}"

    @property
    def reward_ensemble(self) -> Path:
        """Quality of the ensemble, if the run has one."""
        return self.path / "reward_ensemble.json"

    @property
    def reward_quality(self) -> Path:
        """Quality of the reward on held-out comparisons; the file is missing if the labels are ratings."""
        return self.reward_ensemble if self.reward_ensemble.is_file() else self.reward_model / QUALITY

    @property
    def policy(self) -> Path:
        """Hugging Face folder of the policy that PPO trained."""
        return self.path / "policy"

    @property
    def published(self) -> Path:
        """Versions that the run published to an endpoint, for as long as they are served."""
        return self.path / "published"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's log directory, with one run per stage."""
        return self.path / "tensorboard"

    def stage_metrics(self, stage: str) -> Path:
        """The metrics file of a stage (`ppo`, `sft`, `reward_model_2`, …). Only PPO's is in the run's own folder."""
        return self.metrics if stage == "ppo" else self.path / stage / "metrics.jsonl"

    @property
    def holds_run(self) -> bool:
        """Whether the folder holds a run, finished or not."""
        files = (self.config, self.metrics, self.checkpoints, self.sft, self.reward_model, self.policy, self.evaluation)
        return any(file.exists() for file in files)

    @contextmanager
    def claim(self, resume: bool = False) -> Iterator[RunFolder]:
        """Create the folder if necessary and hold it until the block or the process ends.

        `resume=True` accepts a folder with or without a run, so a job that its cluster may restart can always use `--resume`.

        Raises:
            RunFolderBusy: another process holds the folder.
            RunFolderTaken: a new run would overwrite an earlier one.
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
    """Rename a run's folder to the first free of `NAME.1`, `NAME.2`, …; returns the new path, or None if there was no folder.

    Raises RunFolderBusy if a process is running in it.
    """
    if not folder.path.is_dir():
        return None
    with folder.claim(resume=True):
        number = next(n for n in itertools.count(1) if not folder.path.with_name(f"{folder.name}.{n}").exists())
        return folder.path.rename(folder.path.with_name(f"{folder.name}.{number}"))


@contextmanager
def _exclusive(lock: Path, folder: Path) -> Iterator[None]:
    # The lock file is never deleted: a process that opened it earlier would lock a file that others no longer see.
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
    """Replace a file durably: after a crash it holds either the old or the new content. Text is written as UTF-8.

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
