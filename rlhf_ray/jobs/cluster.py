"""A Ray cluster as its job API shows it: the attempts at runs, their logs, their actors.

Invariant: only what this project submitted is listed or touched; what the cluster refuses is said with what to do about it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from rlhf_ray.errors import InputError
from rlhf_ray.jobs.addresses import (
    AUTO,
    JOBS_ALLOWED,
    JOBS_VARIABLES,
    check_answers,
    check_this_machine,
    is_url,
    jobs_address,
    unset,
)
from rlhf_ray.jobs.submission import ATTEMPT, FILES, FOLDER, RUN, Submission
from rlhf_ray.jobs.token import read_token
from rlhf_ray.telemetry.status import RunStatus, newest_status

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


class ClusterRefused(InputError, RuntimeError):
    """The cluster cannot be reached, wants another token, or does not do what it was asked for."""


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
        with _explained(chosen), unset(*JOBS_VARIABLES):
            url = chosen if is_url(chosen) else _dashboard_of(chosen)
            self._jobs = JobSubmissionClient(url, headers=dict(headers))
        self.address = self._jobs.get_address()
        self._state = httpx.Client(base_url=f"{self.address}/api/v0", headers=headers, timeout=30.0)

    def attempts(self) -> list[Attempt]:
        """Of all runs, by name and number."""
        with _explained(self.address):
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
        with _explained(self.address):
            self._jobs.submit_job(
                entrypoint=submission.entrypoint,
                submission_id=submission.id,
                runtime_env={"working_dir": str(folder), "env_vars": dict(submission.environment)},
                metadata=submission.metadata,
            )
        return Attempt(submission, "PENDING")

    def refresh(self, attempt: Attempt) -> Attempt:
        """The attempt as it is now."""
        with _explained(self.address):
            return as_attempt(self._jobs.get_job_info(attempt.submission.id))

    def stop(self, attempt: Attempt, timeout_s: float) -> Attempt:
        """Ask the job to end, and wait until it has.

        Raises:
            ClusterRefused: it takes longer than `timeout_s`.
        """
        with _explained(self.address):
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
        with _explained(self.address):
            return self._jobs.get_job_logs(attempt.submission.id)

    def follow(self, attempt: Attempt) -> Iterator[str]:
        """What the driver has said, and what it says until it ends; in pieces."""
        with _explained(self.address), asyncio.Runner() as runner:
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


def _dashboard_of(address: str) -> str:
    """The jobs API of a cluster, from its head.

    Raises:
        AddressRefused: nobody answers there.
        ClusterRefused: it has no dashboard.
    """
    from ray.dashboard.utils import get_address_for_submission_client

    if address == AUTO:
        check_this_machine(JOBS_ALLOWED)
    else:
        check_answers(address, JOBS_ALLOWED)
    try:
        url = get_address_for_submission_client(address)
    except ValueError as error:
        raise ClusterRefused(f"{address}: {_first_line(error)}; {JOBS_ALLOWED}") from error
    if url == "http://":
        raise ClusterRefused(
            f"{address}: the cluster was started without its dashboard, which takes jobs; {JOBS_ALLOWED}"
        )
    return url


@contextmanager
def _explained(address: str) -> Iterator[None]:
    """Ray's errors in this project's words."""
    from ray.exceptions import AuthenticationError, RayError
    from requests import RequestException

    hint = "set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file that holds it (`ray get-auth-token` prints it on the head)"
    try:
        yield
    except AuthenticationError as error:
        wrong = "failed" in str(error).split("\n")[0]
        why = "refuses this token" if wrong else "wants a token, and none was sent"
        raise ClusterRefused(f"{address} {why}; {hint}") from error
    except ConnectionError as error:
        raise ClusterRefused(
            f"{address}: {error}; name the dashboard by --address http://HOST:8265 or RAY_ADDRESS"
        ) from error
    except RequestException as error:
        raise ClusterRefused(f"{address}: {_first_line(error)}; {JOBS_ALLOWED}") from error
    except InputError:
        raise
    except (RuntimeError, RayError) as error:
        raise ClusterRefused(f"{address}: {_first_line(error)}") from error


def _first_line(error: Any) -> str:
    return str(error).strip().splitlines()[-1][:500] if str(error).strip() else type(error).__name__
