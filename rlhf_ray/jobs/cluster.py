"""A Ray cluster as its job API shows it: the attempts at runs, their logs, their actors.

Invariant: only what this project submitted is listed or touched.
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
from rlhf_ray.jobs.connection import ClusterRefused, dashboard_of, explained, read_token
from rlhf_ray.jobs.submission import ATTEMPT, FILES, FOLDER, RUN, Submission
from rlhf_ray.runs.status import RunStatus, newest_status
from rlhf_ray.runtime.addresses import AUTO, JOBS_VARIABLES, is_url, jobs_address, unset

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

LIVE = ("PENDING", "RUNNING")
ROLES = {
    "RolloutWorker": "rollout", "RewardWorker": "reward", "ReferenceWorker": "reference", "TeacherWorker": "teacher",
    "Learner": "learner", "RayTrainWorker": "trainer",
}  # fmt: skip
"""Classes of actors, as Ray lists them."""
TAIL = 2000
"""Lines of a log in which the newest status is looked for."""


class UnknownRun(InputError, LookupError):
    """The cluster has no run of this name."""


class RunIsLive(InputError, RuntimeError):
    """A run of this name is pending or running."""


@dataclass(frozen=True)
class Attempt:
    """One job: an attempt at a run."""

    submission: Submission
    state: str
    """Ray's: PENDING, RUNNING, STOPPED, SUCCEEDED, FAILED."""
    started: float | None = None
    """Seconds since the epoch."""
    ended: float | None = None
    job: str | None = None
    """Ray's id of the driver; None until it has connected."""
    node: str | None = None
    """On which the driver runs."""

    @property
    def live(self) -> bool:
        """Whether it may still do something."""
        return self.state in LIVE


@dataclass(frozen=True)
class Workers:
    """Actors that are alive."""

    by_role: dict[str, int]
    nodes: int
    """On how many nodes they are."""


class RayCluster:
    """The job API at an address."""

    def __init__(self, address: str | None = None) -> None:
        """`address`: of the dashboard, `http://head:8265`; None: that of RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or of this machine.

        Raises:
            AddressRefused: no address of a jobs API, or a cluster on this machine that has ended.
            ClusterRefused: nobody there, no token, or a wrong one.
        """
        from ray.job_submission import JobSubmissionClient

        logging.getLogger("ray").setLevel(
            logging.WARNING
        )  # it says which package it uploads; people read what is said here
        token = read_token(os.environ)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        chosen = jobs_address(address, os.environ) or AUTO
        # Ray would prefer the environment to what it is given.
        with explained(chosen), unset(*JOBS_VARIABLES):
            url = chosen if is_url(chosen) else dashboard_of(chosen)
            self._jobs = JobSubmissionClient(url, headers=dict(headers))
        self.address = self._jobs.get_address()
        self._state = httpx.Client(base_url=f"{self.address}/api/v0", headers=headers, timeout=30.0)

    def attempts(self) -> list[Attempt]:
        """Of all runs, by name and number."""
        with explained(self.address):
            details = self._jobs.list_jobs()
        return sorted(
            map(as_attempt, filter(_is_ours, details)), key=lambda a: (a.submission.run, a.submission.attempt)
        )

    def newest(self, run: str) -> Attempt:
        """The last attempt at a run.

        Raises:
            UnknownRun: naming those that there are.
        """
        attempts = self.attempts()
        of_run = [attempt for attempt in attempts if attempt.submission.run == run]
        if not of_run:
            known = ", ".join(sorted({attempt.submission.run for attempt in attempts})) or "none"
            raise UnknownRun(f"{self.address} knows no run {run!r}; it has: {known}")
        return of_run[-1]

    def submit(self, submission: Submission, folder: Path) -> Attempt:
        """Send the folder and start the job.

        Raises:
            ClusterRefused: also where the attempt exists already.
        """
        with explained(self.address):
            self._jobs.submit_job(
                entrypoint=submission.entrypoint,
                submission_id=submission.id,
                runtime_env={"working_dir": str(folder), "env_vars": dict(submission.environment)},
                metadata=submission.metadata,
            )
        return Attempt(submission, "PENDING")

    def refresh(self, attempt: Attempt) -> Attempt:
        """The attempt as it is now."""
        with explained(self.address):
            return as_attempt(self._jobs.get_job_info(attempt.submission.id))

    def stop(self, attempt: Attempt, timeout_s: float) -> Attempt:
        """Ask the job to end, and wait until it has.

        Raises:
            ClusterRefused: it takes longer than `timeout_s`.
        """
        with explained(self.address):
            self._jobs.stop_job(attempt.submission.id)
        deadline = time.monotonic() + timeout_s
        while (now := self.refresh(attempt)).live:
            if time.monotonic() > deadline:
                raise ClusterRefused(
                    f"{attempt.submission.id} is still ending after {timeout_s:.0f} s; it goes on by itself: `rlhf-ray status`"
                )
            time.sleep(0.5)
        return now

    def log(self, attempt: Attempt) -> str:
        """All that the driver has said."""
        with explained(self.address):
            return self._jobs.get_job_logs(attempt.submission.id)

    def follow(self, attempt: Attempt) -> Iterator[str]:
        """What the driver has said, and what it says until it ends; in pieces."""
        with explained(self.address), asyncio.Runner() as runner:
            pieces = self._jobs.tail_job_logs(attempt.submission.id)
            while (piece := runner.run(_next(pieces))) is not None:
                yield piece

    def status(self, attempt: Attempt) -> RunStatus:
        """Where the run stands; only its name is known of one that has said nothing yet, or whose log is gone with its node."""
        unknown = RunStatus(attempt.submission.run)
        if attempt.node is None:
            return unknown
        # By its name: asked for by the submission id, Ray 2.60 answers 500.
        log = self._get(
            "/logs/file", node_id=attempt.node, filename=f"job-driver-{attempt.submission.id}.log", lines=TAIL
        )
        return newest_status(log.text.splitlines() if log.is_success else []) or unknown

    def workers(self, attempt: Attempt) -> Workers:
        """The actors of a live run."""
        if not attempt.live or attempt.job is None:
            return Workers({}, 0)
        listed = self._get(
            "/actors", limit=10_000, filter_keys=["job_id", "state"], filter_predicates=["=", "="],
            filter_values=[attempt.job, "ALIVE"],
        ).raise_for_status()  # fmt: skip
        ours = [actor for actor in listed.json()["data"]["result"]["result"] if actor["class_name"] in ROLES]
        by_role = Counter(ROLES[actor["class_name"]] for actor in ours)
        return Workers(dict(by_role), len({actor["node_id"] for actor in ours}))

    def _get(self, path: str, **parameters: Any) -> httpx.Response:
        """From Ray's state API."""
        try:
            return self._state.get(path, params=parameters)
        except httpx.HTTPError as error:
            raise ClusterRefused(f"{self.address}{path}: {error}") from error


def as_attempt(job: JobDetails) -> Attempt:
    """What Ray knows of a job."""
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
                f"run {run!r} is {attempt.state.lower()} as {attempt.submission.id}; watch it by `rlhf-ray status {run}`, "
                f"end it by `rlhf-ray stop {run}`, or give this one another name: name=…"
            )
    return max((attempt.submission.attempt for attempt in of_run), default=0) + 1


async def _next(pieces: AsyncIterator[str]) -> str | None:
    return await anext(pieces, None)


def _is_ours(job: JobDetails) -> bool:
    return {RUN, ATTEMPT, FOLDER, FILES} <= (job.metadata or {}).keys()


def _seconds(milliseconds: int | None) -> float | None:
    return None if not milliseconds else milliseconds / 1000
