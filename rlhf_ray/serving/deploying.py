"""Deploying one application of an endpoint on Ray Serve, and waiting until it runs.

Invariant: an application runs in the runtime environment of the process that started its endpoint. So Serve updates running
gateways and does not replace them when another process publishes, such as a training job with its own package.

Private Ray API: `build_app` and Serve's client. `serve.run` would use the runtime environment of this process, and no public
function tells where a running Serve listens.
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

_POLL_S = 0.2
_SHOWN = 2000
"""Maximum number of characters of Serve's messages in an error."""


def find_version(path: str, label: str | None = None) -> Version:
    """The newest policy of a run, or the model of a Hugging Face folder, as a version to serve.

    Args:
        path: a run's folder, its URI, `URI#name` for a model of that run, or a Hugging Face folder. Models on a store are
            downloaded by each node that serves them.
        label: the version's name; by default the run's name with its step, or the folder's name.

    Raises:
        NotAModel: there is no such run or model.
    """
    if is_reference(path):
        fetch_copy(path, weights=False)
        uri, _, name = path.partition("#")
        return Version(valid_name(label or f"{uri.rpartition('/')[2]}-{name}"), path)
    run = read_run(path)
    if not run.config.is_file():
        folder, name = run.path, run.path.name
    elif run.policy.is_dir():
        records = read_metrics(run.metrics) if run.metrics.is_file() else []
        folder, name = run.policy, f"{run.name}-{records[-1]['step']}" if records else run.name
    else:
        folder, name = run.sft, f"{run.name}-sft"
    if is_uri(path):
        return find_version(f"{path.rstrip('/')}#{folder.name}", label or name)
    if run.config.is_file() and not folder.is_dir():
        raise NotAModel(
            f"{path!r} is a run that has no policy and no SFT model yet; wait for it, or choose another run"
        )
    if not folder.is_dir():
        raise NotAModel(f"{path!r} is neither a run's folder nor a Hugging Face model folder: it does not exist")
    check_model_folder(str(folder), "the model to serve")
    return Version(valid_name(label or name), str(folder))


def valid_name(name: str) -> str:
    """The text as a version's name, which has only letters, digits, `.`, `_` and `-`."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "policy"


class NotStarted(InputError, RuntimeError):
    """An application did not start."""


class RouteTaken(InputError, RuntimeError):
    """Another application of the cluster uses the route."""


def deploy(built: serve.Application, name: str, runtime_env: Mapping[str, Any], route: str | None = None) -> None:
    """Deploy an application on Serve, or update it, without waiting.

    Raises:
        RouteTaken: another application uses the route.
    """
    app = build_app(built, name=name, route_prefix=route)
    app = replace(app, deployments=[_with_environment(deployment, runtime_env) for deployment in app.deployments])
    try:
        _get_global_client().deploy_applications([app], wait_for_applications_running=False)
    except RayServeException as error:
        raise RouteTaken(
            f"Serve refused {name}: {error} Stop the application that uses the route (`rlhf-ray unserve`, or a "
            "`rlhf-ray watch`), or use another cluster"
        ) from error


def _with_environment(deployment: serve.Deployment, runtime_env: Mapping[str, Any]) -> serve.Deployment:
    """The deployment with this runtime environment; the deployment's own values override it."""
    options = dict(deployment.ray_actor_options or {})
    own = options.get("runtime_env") or {}
    variables = {**runtime_env.get("env_vars", {}), **own.get("env_vars", {})}
    whole = {**runtime_env, **own, **({"env_vars": variables} if variables else {})}
    return deployment.options(ray_actor_options=options | {"runtime_env": whole})


def wait_until_running(name: str, timeout_s: float, give_up: Callable[[], bool]) -> None:
    """Wait until an application runs.

    Raises:
        NotStarted: it failed, the timeout passed, or `give_up` returned True; the message contains Serve's.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        found = serve.status().applications.get(name)
        if found is None:
            raise NotStarted(f"{name} was deleted while it started")
        if found.status == ApplicationStatus.RUNNING:
            return
        failed = found.status == ApplicationStatus.DEPLOY_FAILED
        if failed or give_up() or time.monotonic() > deadline:
            messages = " ".join([found.message, *(d.message for d in found.deployments.values())]).strip()
            late = "was given up" if give_up() else f"was not running after {timeout_s:.0f} s (start_s)"
            how = "failed" if failed else late
            raise NotStarted(f"{name} {how}: {messages[-_SHOWN:] or 'Serve gives no reason; see its logs'}")
        time.sleep(_POLL_S)


def http_address() -> tuple[str, int]:
    """Host and port on which the cluster's Serve listens; it must be running."""
    http = _get_global_client().http_config
    return http.host, http.port
