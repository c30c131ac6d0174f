"""`rlhf-ray submit`, `status`, `logs`, `stop`, `resume`, `list`: runs as jobs of a Ray cluster."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf_ray.cli.app import JOBS, LOOK, Config, Overrides, command

if TYPE_CHECKING:
    from rlhf_ray.jobs.cluster import Attempt, RayCluster
    from rlhf_ray.jobs.submission import Submission

Address = Annotated[
    str | None,
    typer.Option(help="The cluster's dashboard, http://HOST:8265; default: RAY_ADDRESS", show_default=False),
]
Run = Annotated[str, typer.Argument(help="Name of the run", show_default=False)]
Follow = Annotated[bool, typer.Option(help="Print the run's output until it ends")]


@command(JOBS, "rlhf-ray submit config.yaml folder=/shared/runs --follow")
def submit(
    config: Config,
    overrides: Overrides = None,
    address: Address = None,
    follow: Follow = False,
    resume: Annotated[bool, typer.Option(help="Continue the run of this name, if its folder holds one")] = False,
    fresh: Annotated[bool, typer.Option(help="Rename an older run of this name and start again")] = False,
    env: Annotated[
        list[str] | None,
        typer.Option(help="Environment variable to send with the run, e.g. a judge's key; repeatable"),
    ] = None,
) -> None:
    """Run a config as a job of a Ray cluster. This directory is sent with it, without secrets, runs and virtual environments."""
    from rlhf_ray.config import ConfigError, dump_config, load_config
    from rlhf_ray.jobs.cluster import RayCluster, check_not_live
    from rlhf_ray.jobs.connection import read_token
    from rlhf_ray.jobs.submission import ADDRESS, plan_submission, secrets_of

    settings = load_config(config, [*(overrides or []), ADDRESS])
    if missing := [name for name in env or [] if name not in os.environ]:
        raise ConfigError(f"--env {missing[0]}: this variable is not set")
    if fresh and resume:
        raise ConfigError("--fresh starts a new run and --resume continues one; choose one of them")
    flags = ["--fresh"] if fresh else ["--resume"] if resume else []
    forwarded, token = {name: os.environ[name] for name in env or []}, read_token(os.environ)
    # Errors in the config are reported before the cluster is contacted.
    first = plan_submission(settings, Path.cwd(), 1, flags, forwarded, token)
    cluster = RayCluster(address)
    submission = replace(first, attempt=check_not_live(cluster.attempts(), settings.name))
    _send(cluster, submission, follow, dump_config(settings), secrets_of(settings, forwarded).values)


@command(JOBS, "rlhf-ray resume my-run ppo.steps=200")
def resume(run: Run, overrides: Overrides = None, address: Address = None, follow: Follow = False) -> None:
    """Continue a run that ended, from its newest checkpoint. ppo.steps may change, and settings that do not affect the result."""
    from rlhf_ray.jobs.cluster import RayCluster, check_not_live
    from rlhf_ray.jobs.secrets import received
    from rlhf_ray.jobs.submission import next_attempt

    cluster = RayCluster(address)
    check_not_live(cluster.attempts(), run)
    submission = next_attempt(cluster.newest(run).submission, overrides or [])
    secrets = received({**os.environ, **submission.environment}).values
    _send(cluster, submission, follow, secrets=secrets)


@command(JOBS, "rlhf-ray stop my-run")
def stop(
    run: Run,
    address: Address = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the last checkpoint")] = 1800.0,
) -> None:
    """Stop a run after a last checkpoint. `rlhf-ray resume` continues it."""
    from rlhf_ray.jobs.cluster import RayCluster
    from rlhf_ray.telemetry.console import console

    cluster = RayCluster(address)
    attempt = cluster.newest(run)
    if not attempt.live:
        console.print(f"{attempt.submission.id} has ended already ({attempt.state.lower()})", highlight=False)
        return
    with console.status(f"{run} finishes its step and writes a last checkpoint"):
        attempt = cluster.stop(attempt, timeout)
    # The driver's last message names the checkpoint.
    messages = [line for line in cluster.log(attempt).splitlines() if line.startswith("rlhf-ray: ")]
    console.print(f"{attempt.submission.id} {attempt.state.lower()}", highlight=False)
    if messages:
        console.print(messages[-1], highlight=False, markup=False, soft_wrap=True)


@command(JOBS, "rlhf-ray logs my-run --follow")
def logs(run: Run, address: Address = None, follow: Follow = False) -> None:
    """Print the output of the newest attempt at a run."""
    from rlhf_ray.jobs.cluster import RayCluster

    cluster = RayCluster(address)
    _print_log(cluster, cluster.newest(run), follow)


@command(LOOK, "rlhf-ray status runs/quickstart")
def status(
    run: Annotated[
        str | None,
        typer.Argument(
            help="A run's name, or its folder by path or URI; default: all runs of the cluster", show_default=False
        ),
    ] = None,
    address: Address = None,
) -> None:
    """Show the state of runs: stage, step, reward, KL, throughput, workers, alerts, faults."""
    from rlhf_ray.jobs.cluster import RayCluster
    from rlhf_ray.jobs.tables import status_table
    from rlhf_ray.runs.run_folder import RunFolderError
    from rlhf_ray.runs.status import read_status
    from rlhf_ray.runs.storage.session import read_run
    from rlhf_ray.telemetry.console import console

    if run is not None:
        folder = read_run(run)
        if folder.holds_run:
            console.print(status_table([(None, read_status(folder), None)]))
            return
        # A run on a cluster has no such name.
        if "/" in run or run.startswith((".", "~")):
            what = "holds no run" if folder.path.exists() else "does not exist"
            raise RunFolderError(
                f"{folder.path} {what}; expected a run's folder, its URI, or the name of a run on a cluster"
            )
    cluster = RayCluster(address)
    newest = {attempt.submission.run: attempt for attempt in cluster.attempts()}
    chosen = [cluster.newest(run)] if run is not None else list(newest.values())
    console.print(status_table((a, cluster.status(a), cluster.workers(a)) for a in chosen))


@command(JOBS, "rlhf-ray list", name="list")
def list_runs(address: Address = None) -> None:
    """List all runs that the cluster knows."""
    from rlhf_ray.jobs.cluster import RayCluster
    from rlhf_ray.jobs.tables import run_table
    from rlhf_ray.telemetry.console import console

    console.print(run_table(RayCluster(address).attempts()))


def _send(
    cluster: RayCluster, submission: Submission, follow: bool, config: str | None = None, secrets: Sequence[str] = ()
) -> None:
    from rlhf_ray.jobs.packing import pack
    from rlhf_ray.telemetry.console import console

    with tempfile.TemporaryDirectory(prefix="rlhf-ray-") as folder:
        package = pack(Path.cwd(), config, submission.files, Path(folder), secrets)
        attempt = cluster.submit(submission, package.folder)
    for path in package.left_out:
        console.print(f"left out  {path}: it contains a value that may be a secret", highlight=False, markup=False)
    run, files = submission.run, f"{len(package.files)} files, {package.bytes / (1 << 20):.1f} MiB"
    console.print(f"submitted {submission.id} to {cluster.address} ({files})", highlight=False, soft_wrap=True)
    if follow:
        _print_log(cluster, attempt, follow)
    else:
        console.print(f"watch     rlhf-ray status {run}   or   rlhf-ray logs {run} --follow", highlight=False)


def _print_log(cluster: RayCluster, attempt: Attempt, follow: bool) -> None:
    """Print the log. Exit with status 1 if the followed run does not succeed."""
    from rlhf_ray.runs.status import without_status

    for text in without_status(cluster.follow(attempt) if follow else [cluster.log(attempt)]):
        sys.stdout.write(text)
        sys.stdout.flush()
    if follow and (ended := cluster.refresh(attempt)).state != "SUCCEEDED":
        print(f"rlhf-ray: {attempt.submission.id} ended: {ended.state.lower()}", file=sys.stderr)
        raise typer.Exit(1)
