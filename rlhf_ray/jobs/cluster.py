"""Runs on a Ray cluster through its job API: the attempts at each run, their logs and actors.

Invariant: only jobs that this project submitted are listed or changed.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from rlhf_ray.errors import InputError
from rlhf_ray.jobs.connection import ClusterRefused, dashboard_of, read_token, readable_errors
from rlhf_ray.jobs.submission import ATTEMPT, FILES, FOLDER, RUN, Submission
from rlhf_ray.roles import status_labels
from rlhf_ray.runs.status import RunStatus, newest_status
from rlhf_ray.runtime.addresses import AUTO, JOBS_VARIABLES, is_url, jobs_address, unset

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

LIVE = ("PENDING", "RUNNING")
LABELS = {**status_labels(), "RayTrainWorker": "trainer"}
"""What status calls an actor, by the name of its class. Ray Train's workers run the supervised stages."""
TAIL = 2000
"""Number of lines at the end of a log that are searched for the newest status."""


class UnknownRun(InputError, LookupError):
    """The cluster knows no run of this name."""


class RunIsLive(InputError, RuntimeError):
    """A run of this name is pending or running."""


@dataclass(frozen=True)
class Attempt:
    """One attempt at a run, which is one Ray job."""

    submission: Submission
    state: str
    """Ray's job status: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    started: float | None = None
    """Seconds since the epoch."""
    ended: float | None = None
    """Seconds since the epoch."""
    job: str | None = None
    """Ray's id of the driver's job; None until the driver has connected."""
    node: str | None = None
    """Id of the node that runs the driver."""

    @property
    def live(self) -> bool:
        """Whether it has not ended."""
        return self.state in LIVE


@dataclass(frozen=True)
class Workers:
    """The live actors of a run."""

    by_role: dict[str, int]
    nodes: int
    """Number of nodes that they run on."""


class RayCluster:
    """A client of a cluster's job API."""

    def __init__(self, address: str | None = None) -> None:
        """Connect to the job API.

        Args:
            address: the dashboard's, such as `http://head:8265`; None: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or this machine's.

        Raises:
            AddressRefused: it is not the address of a job API, or the cluster on this machine has ended.
            ClusterRefused: nothing answers there, or the token is missing or wrong.
        """
        from ray.job_submission import JobSubmissionClient

        logging.getLogger("ray").setLevel(logging.WARNING)
        token = read_token(os.environ)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        chosen = jobs_address(address, os.environ) or AUTO
        # Ray would prefer the environment variables to the given address.
        with readable_errors(chosen), unset(*JOBS_VARIABLES):
            url = chosen if is_url(chosen) else dashboard_of(chosen)
            self._jobs = JobSubmissionClient(url, headers=dict(headers))
        self.address = self._jobs.get_address()
        self._state = httpx.Client(base_url=f"{self.address}/api/v0", headers=headers, timeout=30.0)

    def attempts(self) -> list[Attempt]:
        """All attempts at all runs, sorted by run and number."""
        with readable_errors(self.address):
            details = self._jobs.list_jobs()
        return sorted(
            map(as_attempt, filter(_is_ours, details)), key=lambda a: (a.submission.run, a.submission.attempt)
        )

    def newest(self, run: str) -> Attempt:
        """The last attempt at a run.

        Raises:
            UnknownRun: listing the runs that the cluster knows.
        """
        attempts = self.attempts()
        of_run = [attempt for attempt in attempts if attempt.submission.run == run]
        if not of_run:
            known = ", ".join(sorted({attempt.submission.run for attempt in attempts})) or "none"
            raise UnknownRun(f"{self.address} knows no run {run!r}; it knows: {known}")
        return of_run[-1]

    def submit(self, submission: Submission, folder: Path) -> Attempt:
        """Upload the folder and start the job.

        Raises:
            ClusterRefused: also if this attempt exists already.
        """
        with readable_errors(self.address):
            self._jobs.submit_job(
                entrypoint=submission.entrypoint,
                submission_id=submission.id,
                runtime_env={"working_dir": str(folder), "env_vars": dict(submission.environment)},
                metadata=submission.metadata,
            )
        return Attempt(submission, "PENDING")

    def refresh(self, attempt: Attempt) -> Attempt:
        """The current state of an attempt."""
        with readable_errors(self.address):
            return as_attempt(self._jobs.get_job_info(attempt.submission.id))

    def stop(self, attempt: Attempt, timeout_s: float) -> Attempt:
        """Stop the job, and wait until it has ended.

        Raises:
            ClusterRefused: it takes longer than `timeout_s`.
        """
        with readable_errors(self.address):
            self._jobs.stop_job(attempt.submission.id)
        deadline = time.monotonic() + timeout_s
        while (now := self.refresh(attempt)).live:
            if time.monotonic() > deadline:
                raise ClusterRefused(
                    f"{attempt.submission.id} is still stopping after {timeout_s:.0f} s; see `rlhf-ray status`"
                )
            time.sleep(0.5)
        return now

    def log(self, attempt: Attempt) -> str:
        """The driver's whole output so far."""
        with readable_errors(self.address):
            return self._jobs.get_job_logs(attempt.submission.id)

    def follow(self, attempt: Attempt) -> Iterator[str]:
        """Yield the driver's output in pieces until it ends."""
        with readable_errors(self.address), asyncio.Runner() as runner:
            pieces = self._jobs.tail_job_logs(attempt.submission.id)
            while (piece := runner.run(_next(pieces))) is not None:
                yield piece

    def status(self, attempt: Attempt) -> RunStatus:
        """The run's newest status; only its name if the driver has printed none yet, or if its log is gone with its node."""
        unknown = RunStatus(attempt.submission.run)
        if attempt.node is None:
            return unknown
        # By the file's name: with the submission id, Ray 2.60 answers 500.
        log = self._get(
            "/logs/file", node_id=attempt.node, filename=f"job-driver-{attempt.submission.id}.log", lines=TAIL
        )
        return newest_status(log.text.splitlines() if log.is_success else []) or unknown

    def workers(self, attempt: Attempt) -> Workers:
        """The live actors of a run."""
        if not attempt.live or attempt.job is None:
            return Workers({}, 0)
        listed = self._get(
            "/actors", limit=10_000, filter_keys=["job_id", "state"], filter_predicates=["=", "="],
            filter_values=[attempt.job, "ALIVE"],
        ).raise_for_status()  # fmt: skip
        ours = [actor for actor in listed.json()["data"]["result"]["result"] if actor["class_name"] in LABELS]
        by_role = Counter(LABELS[actor["class_name"]] for actor in ours)
        return Workers(dict(by_role), len({actor["node_id"] for actor in ours}))

    def _get(self, path: str, **parameters: Any) -> httpx.Response:
        """A response of Ray's state API."""
        try:
            return self._state.get(path, params=parameters)
        except httpx.HTTPError as error:
            raise ClusterRefused(f"{self.address}{path}: {error}") from error


def as_attempt(job: JobDetails) -> Attempt:
    """An attempt from Ray's details of its job."""
    metadata, environment = job.metadata, (job.runtime_env or {}).get("env_vars", {})
    submission = Submission(
        metadata[RUN],
        int(metadata[ATTEMPT]),
        metadata[FOLDER],
        job.entrypoint,
        tuple(json.loads(metadata[FILES])),
        environment,
    )
    return Attempt(
        submission,
        str(job.status.value),
        _seconds(job.start_time),
        _seconds(job.end_time),
        job.job_id,
        job.driver_node_id,
    )


def check_not_live(attempts: Sequence[Attempt], run: str) -> int:
    """The number of the next attempt at a run.

    Raises:
        RunIsLive: one is pending or running.
    """
    of_run = [attempt for attempt in attempts if attempt.submission.run == run]
    for attempt in of_run:
        if attempt.live:
            raise RunIsLive(
                f"run {run!r} is {attempt.state.lower()} as {attempt.submission.id}; watch it with `rlhf-ray status {run}`, "
                f"stop it with `rlhf-ray stop {run}`, or give this run another name: name=…"
            )
    return max((attempt.submission.attempt for attempt in of_run), default=0) + 1


async def _next(pieces: AsyncIterator[str]) -> str | None:
    return await anext(pieces, None)


def _is_ours(job: JobDetails) -> bool:
    return {RUN, ATTEMPT, FOLDER, FILES} <= (job.metadata or {}).keys()


def _seconds(milliseconds: int | None) -> float | None:
    return None if not milliseconds else milliseconds / 1000
