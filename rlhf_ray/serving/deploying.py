"""One application of an endpoint in Ray Serve: handed over, and waited for.

Invariant: an application runs in the environment of whoever started its endpoint, so that Serve changes running gateways and does
not replace them when somebody else, such as a training job with a package of its own, publishes.
"""

from __future__ import annotations

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
