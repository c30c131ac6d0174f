"""An endpoint as Ray Serve's config files have it: `serve deploy FILE`, and KubeRay's RayService.

Invariant: the applications are those of `rlhf-ray serve`, built by the same functions; what a file says is the state, so versions
change by changing the file: an application for the new engines, then the gateway's `versions`.
"""

from __future__ import annotations

import os
from typing import Any

from pydantic import Field
from ray.serve import Application

from rlhf_ray.config.section import Section
from rlhf_ray.config.serving import ServingConfig
from rlhf_ray.serving.gateway import REWARDS, application, build_gateway
from rlhf_ray.serving.guard import KeysError, read_keys
from rlhf_ray.serving.policy import build_policy
from rlhf_ray.serving.rewards import build_rewards
from rlhf_ray.serving.versions import Version, Versions


class ServedVersion(Section):
    """`rlhf_ray.serving.versions.Version`."""

    name: str
    """For clients; of the application, too: `<endpoint>.<name>`."""
    folder: str
    """Hugging Face folder that all nodes see, or `URI#name` of a model of a run on a store."""


class GatewayArguments(Section):
    """Of the application with the endpoint's route."""

    serving: ServingConfig
    """The endpoint."""
    stable: ServedVersion
    """Who gets the traffic,"""
    candidate: ServedVersion | None = None
    """and who gets a share of it."""
    share: float = Field(0.0, ge=0, lt=1)
    """Of the candidate."""
    previous: ServedVersion | None = None
    """Alive, to go back to."""

    @property
    def versions(self) -> Versions:
        return Versions.from_dict(self.model_dump(exclude={"serving"}))


class EngineArguments(Section):
    """Of the engines of a version."""

    serving: ServingConfig
    """The endpoint."""
    version: ServedVersion
    """The policy."""


class RewardArguments(Section):
    """Of the reward model."""

    serving: ServingConfig
    """The endpoint, with a `reward_model`."""


def gateway(arguments: dict[str, Any]) -> Application:
    """`GatewayArguments` as an application; the keys are in the environment of the cluster's nodes.

    Raises:
        ValidationError, KeysError: naming what is wrong.
    """
    asked = GatewayArguments.model_validate(arguments)
    variable = asked.serving.keys_env
    keys = None if variable is None else read_keys(variable, os.environ)
    if keys == {}:
        raise KeysError(
            f"{variable} is not set on the cluster's nodes; set it to name:key, or serving.keys_env to null"
        )
    return build_gateway(asked.serving, keys, asked.versions)


def engines(arguments: dict[str, Any]) -> Application:
    """`EngineArguments` as an application."""
    asked = EngineArguments.model_validate(arguments)
    return build_policy(asked.serving, Version(**asked.version.model_dump()))


def rewards(arguments: dict[str, Any]) -> Application:
    """`RewardArguments` as an application."""
    return build_rewards(RewardArguments.model_validate(arguments).serving)


def serve_config(config: ServingConfig, versions: Versions) -> dict[str, Any]:
    """The content of a config file for `serve deploy`, or of a RayService's `serveConfigV2`."""
    serving = config.model_dump(exclude_defaults=True, mode="json") | {"name": config.name}
    routed = {"serving": serving, **{key: value for key, value in versions.as_dict().items() if value}}
    applications = [_application(config, "gateway", "gateway", routed, route="/")]
    for version in versions.alive:
        arguments = {"serving": serving, "version": {"name": version.name, "folder": version.folder}}
        applications.append(_application(config, version.name, "engines", arguments))
    if config.reward_model is not None:
        applications.append(_application(config, REWARDS, "rewards", {"serving": serving}))
    http = {"host": config.host, "port": config.port, "request_timeout_s": config.limits.timeout_s}
    return {"proxy_location": "EveryNode", "http_options": http, "applications": applications}


def _application(
    config: ServingConfig, part: str, builder: str, arguments: dict[str, Any], route: str | None = None
) -> dict[str, Any]:
    return {
        "name": application(config.name, part),
        "route_prefix": route,
        "import_path": f"rlhf_ray.serving.declarative:{builder}",
        "args": arguments,
    }
