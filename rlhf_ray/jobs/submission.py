"""From a config to the arguments of Ray's job API. Pure functions.

Invariants: a submission id is the run's name and the attempt's number, so Ray itself refuses a second submission of one attempt;
environment values, which may be secrets, leave this process encrypted.
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
"""Keys in the metadata of a job."""
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
"""Variable for how long Ray waits for a stopping job before it kills it."""
STOP_WAIT_S = 1800
"""Enough for the current step and its checkpoint with 70 billion parameters."""
ADDRESS = "cluster.address=auto"


class NotSubmittable(InputError, ValueError):
    """The config cannot be run as a job."""


@dataclass(frozen=True)
class Submission:
    """One attempt at a run."""

    run: str
    attempt: int
    folder: str
    """The run's folder, as the nodes see it."""
    entrypoint: str
    files: tuple[str, ...]
    """Relative paths that the config mentions."""
    environment: Mapping[str, str]
    """Environment variables of the job and its actors; secrets are encrypted."""

    @property
    def id(self) -> str:
        """Ray's submission id. Ray accepts each id once."""
        return f"{self.run}-attempt{self.attempt}"

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata that `list`, `status` and `resume` read back."""
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
    """An attempt at a run with this config.

    Args:
        root: the directory that is submitted.
        flags: options for `rlhf-ray run`.
        forwarded: environment variables for the run's driver.
        token: the cluster's token.

    Raises:
        SecretsError: there are values to encrypt, and no token.
        NotSubmittable: the run's folder would be inside the job's temporary directory, and be lost with it.
    """
    folder = config.folder.rstrip("/")
    if not PurePosixPath(folder).is_absolute() and "://" not in folder:
        raise NotSubmittable(
            f"folder is {config.folder!r}, a relative path; a job's own directory is deleted with it, so runs need a path that "
            f"all nodes can read: folder=/mnt/shared/runs, or folder={root / folder} if the nodes share this machine's disk; "
            "or a store: folder=s3://bucket/runs"
        )
    environment = {STOP_WAIT: str(STOP_WAIT_S)}
    if values := secrets_of(config, forwarded):
        environment[VARIABLE] = encrypt(values, token)
    files = tuple(sorted(_existing(config.model_dump(mode="json", exclude={"folder", "name"}), root)))
    command = entrypoint(str(CONFIG), flags)
    return Submission(config.name, attempt, f"{folder}/{config.name}", command, files, environment)


def secrets_of(config: RunConfig, forwarded: Mapping[str, str] | None = None) -> JobSecrets:
    """The values that must be encrypted in transit."""
    return JobSecrets(forwarded or {}, environment_values(config))


def next_attempt(before: Submission, overrides: Sequence[str] = ()) -> Submission:
    """The next attempt at a run, with the config from its folder."""
    unset = [override for override in overrides if "=" not in override]
    if unset:
        raise ConfigError(f"{unset[0]!r}: an override has the form section.key=value")
    command = entrypoint(f"{before.folder}/config.yaml", [*overrides, "--resume"])
    return replace(before, attempt=before.attempt + 1, entrypoint=command)


def entrypoint(config: str, arguments: Sequence[str]) -> str:
    """The job's command. With `exec`, the signal that stops a job reaches Python and not a shell."""
    return "exec " + shlex.join(["python", "-m", "rlhf_ray", "run", config, ADDRESS, *arguments])


def _existing(value: object, root: Path) -> set[str]:
    """Strings of a config that are relative paths of existing files or folders in `root`."""
    if isinstance(value, dict):
        return {found for item in value.values() for found in _existing(item, root)}
    if isinstance(value, list):
        return {found for item in value for found in _existing(item, root)}
    if not isinstance(value, str) or not value or len(value) > 500 or "\n" in value:
        return set()
    path = PurePosixPath(value)
    inside = not path.is_absolute() and ".." not in path.parts and path.parts
    return {value} if inside and (root / path).exists() else set()
