"""From a config to what Ray's job API is asked for. Pure.

Invariants: a submission id is the run's name and the number of the attempt, so two submissions of the same attempt are refused by
Ray itself; values of environments, which may be secrets, leave this process encrypted.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from rlhf_ray.config import ConfigError, RunConfig
from rlhf_ray.config.changes import environment_values
from rlhf_ray.errors import InputError
from rlhf_ray.jobs.packing import CONFIG
from rlhf_ray.jobs.secrets import VARIABLE, JobSecrets, encrypt

RUN, ATTEMPT, FOLDER, FILES = "rlhf_ray.run", "rlhf_ray.attempt", "rlhf_ray.folder", "rlhf_ray.files"
"""Keys of a job's metadata."""
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
"""How long Ray lets a job that is to stop finish, before it kills it."""
STOP_WAIT_S = 1800
"""Enough for the step that is under way and its checkpoint, at 70 billion parameters, too."""
ADDRESS = "cluster.address=auto"


class NotSubmittable(InputError, ValueError):
    """The config cannot be run as a job."""


@dataclass(frozen=True)
class Submission:
    """One attempt at a run."""

    run: str
    attempt: int
    folder: str
    """Of the run, as its nodes see it."""
    entrypoint: str
    files: tuple[str, ...]
    """Relative paths that the config names."""
    environment: Mapping[str, str]
    """Of the job and all its actors; secrets are encrypted."""

    @property
    def id(self) -> str:
        """Ray's submission id; Ray takes each once."""
        return f"{self.run}-attempt{self.attempt}"

    @property
    def metadata(self) -> dict[str, str]:
        """What `list`, `status` and `resume` read back."""
        return {
            RUN: self.run,
            ATTEMPT: str(self.attempt),
            FOLDER: self.folder,
            FILES: json.dumps(self.files),
        }


def plan_submission(
    config: RunConfig,
    root: Path,
    attempt: int,
    flags: Sequence[str] = (),
    forwarded: Mapping[str, str] | None = None,
    token: str | None = None,
) -> Submission:
    """The first attempt, or another, with the config of now.

    Args:
        root: the directory that is submitted.
        flags: of `rlhf-ray run`.
        forwarded: environment variables that the run's driver is to have.
        token: the cluster's.

    Raises:
        SecretsError: there are values to be encrypted, and no token.
        NotSubmittable: the run's folder would lie in the job's temporary directory, and be lost with it.
    """
    folder = config.folder.rstrip("/")
    if not PurePosixPath(folder).is_absolute() and "://" not in folder:
        raise NotSubmittable(
            f"folder is {config.folder!r}, relative; a job's own directory is gone with the job, so runs need a path that "
            f"all nodes see: folder=/mnt/shared/runs, or folder={root / folder} where the nodes share this machine's disk; "
            "or a store: folder=s3://bucket/runs"
        )
    environment = {STOP_WAIT: str(STOP_WAIT_S)}
    if values := secrets_of(config, forwarded):
        environment[VARIABLE] = encrypt(values, token)
    files = tuple(sorted(_existing(config.model_dump(mode="json", exclude={"folder", "name"}), root)))
    command = entrypoint(str(CONFIG), flags)
    return Submission(config.name, attempt, f"{folder}/{config.name}", command, files, environment)


def secrets_of(config: RunConfig, forwarded: Mapping[str, str] | None = None) -> JobSecrets:
    """What must not be read on the way."""
    return JobSecrets(forwarded or {}, environment_values(config))


def next_attempt(before: Submission, overrides: Sequence[str] = ()) -> Submission:
    """Go on with a run: the config is the one that its folder holds."""
    unset = [override for override in overrides if "=" not in override]
    if unset:
        raise ConfigError(f"{unset[0]!r}: an override has the form section.key=value")
    command = entrypoint(f"{before.folder}/config.yaml", [*overrides, "--resume"])
    return replace(before, attempt=before.attempt + 1, entrypoint=command)


def entrypoint(config: str, arguments: Sequence[str]) -> str:
    """The job's command. `exec`: the signal that stops a job must reach Python, not a shell."""
    return "exec " + shlex.join(["python", "-m", "rlhf_ray", "run", config, ADDRESS, *arguments])


def _existing(value: object, root: Path) -> set[str]:
    """Strings of a config that are relative paths of something in `root`."""
    if isinstance(value, dict):
        return {found for item in value.values() for found in _existing(item, root)}
    if isinstance(value, list):
        return {found for item in value for found in _existing(item, root)}
    if not isinstance(value, str) or not value or len(value) > 500 or "\n" in value:
        return set()
    path = PurePosixPath(value)
    inside = not path.is_absolute() and ".." not in path.parts and path.parts
    return {value} if inside and (root / path).exists() else set()
