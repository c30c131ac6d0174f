"""One application of an endpoint in Ray Serve: handed over, and waited for.

Invariant: an application runs in the environment of whoever started its endpoint, so that Serve changes running gateways and does
not replace them when somebody else, such as a training job with a package of its own, publishes.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ray import serve
from ray.serve._private.build_app import build_app
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus

from rlhf_ray.errors import InputError
from rlhf_ray.models.loading import NotAModel, check_model_folder
from rlhf_ray.runs.metrics import read_metrics
from rlhf_ray.runs.storage.folders import fetch_copy
from rlhf_ray.runs.storage.location import is_reference, is_uri
from rlhf_ray.runs.storage.session import read_run
from rlhf_ray.serving.versions import Version


def version_of(path: str, label: str | None = None) -> Version:
    """The newest policy of a run's folder, or the model of a Hugging Face folder.

    Args:
        path: of either. A run may also be named by its URI, and a model in it by `URI#name`: then each node that serves it
            fetches it.
        label: the version's name; by default the run's with its step, or the folder's.

    Raises:
        NotAModel: it is neither.
    """
    if is_reference(path):
        fetch_copy(path, weights=False)
        run, _, name = path.partition("#")
        return Version(plain(label or f"{run.rpartition('/')[2]}-{name}"), path)
    run = read_run(path)
    if not run.config.is_file():
        folder, name = run.path, run.path.name
    elif run.policy.is_dir():
        records = read_metrics(run.metrics) if run.metrics.is_file() else []
        folder, name = run.policy, f"{run.name}-{records[-1]['step']}" if records else run.name
    else:
        folder, name = run.sft, f"{run.name}-sft"
    if is_uri(path):  # whether it is whole is looked at there
        return version_of(f"{path.rstrip('/')}#{folder.name}", label or name)
    if run.config.is_file() and not folder.is_dir():
        raise NotAModel(f"{path!r} is a run that has no policy yet, and no SFT model; wait for it, or name another")
    if not folder.is_dir():
        raise NotAModel(
            f"{path!r} is neither the folder of a run nor a Hugging Face model folder: there is no such folder"
        )
    check_model_folder(str(folder), "the model to serve")
    return Version(plain(label or name), str(folder))


def plain(name: str) -> str:
    """A name for a version: letters, digits, `.`, `_` and `-`."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "policy"


_POLL_S = 0.2
_SHOWN = 2000
"""Characters of the reason why engines did not start."""


class NotStarted(InputError, RuntimeError):
    """An application did not come up."""


class RouteTaken(InputError, RuntimeError):
    """Another application of the cluster has the route."""


def hand_over(built: serve.Application, name: str, runtime_env: Mapping[str, Any], route: str | None = None) -> None:
    """Give Serve an application, or its next state. `serve.run` would take the environment of this process instead.

    Raises:
        RouteTaken: another application has the route.
    """
    app = build_app(built, name=name, route_prefix=route)
    app = replace(app, deployments=[_in_environment(deployment, runtime_env) for deployment in app.deployments])
    try:
        _get_global_client().deploy_applications([app], wait_for_applications_running=False)
    except RayServeException as error:
        raise RouteTaken(
            f"this cluster's Serve did not take {name}: {error} End what has the route (`rlhf-ray unserve`, or a `watch`), or "
            "use another cluster"
        ) from error


def _in_environment(deployment: serve.Deployment, runtime_env: Mapping[str, Any]) -> serve.Deployment:
    """With that runtime environment below its own."""
    options = dict(deployment.ray_actor_options or {})
    own = options.get("runtime_env") or {}
    variables = {**runtime_env.get("env_vars", {}), **own.get("env_vars", {})}
    whole = {**runtime_env, **own, **({"env_vars": variables} if variables else {})}
    return deployment.options(ray_actor_options=options | {"runtime_env": whole})


def wait_for(name: str, patience_s: float, give_up: Callable[[], bool]) -> None:
    """Until an application runs.

    Raises:
        NotStarted: it failed, or was not there in time or when this process gave up; with what Serve says of it.
    """
    deadline = time.monotonic() + patience_s
    while True:
        found = serve.status().applications.get(name)
        if found is None:
            raise NotStarted(f"{name} was deleted while it was starting")
        if found.status == ApplicationStatus.RUNNING:
            return
        failed = found.status == ApplicationStatus.DEPLOY_FAILED
        if failed or give_up() or time.monotonic() > deadline:
            said = " ".join([found.message, *(d.message for d in found.deployments.values())]).strip()
            late = "was not waited for any longer" if give_up() else f"was not up after {patience_s:.0f} s (start_s)"
            how = "failed" if failed else late
            raise NotStarted(f"{name} {how}: {said[-_SHOWN:] or 'Serve gives no reason; its logs may'}")
        time.sleep(_POLL_S)
