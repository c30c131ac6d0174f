"""An endpoint as a config file of Ray Serve, for `serve deploy FILE` and for KubeRay's RayService.

Invariant: the applications are those of `rlhf-ray serve`, built by the same functions. The file describes the state, so versions
are changed in the file: first add an application with the new engines, then change the versions of the gateway.
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
    """A version (`rlhf_ray.serving.versions.Version`)."""

    name: str
    """Name that clients see. The application's name is `<endpoint>.<name>`."""
    folder: str
    """Hugging Face folder that all nodes can read, or `URI#name` for a model of a run on a store."""


class GatewayArguments(Section):
    """Arguments of the gateway, the application that receives the requests."""

    serving: ServingConfig
    """The endpoint's config."""
    stable: ServedVersion
    """The version that gets the traffic."""
    candidate: ServedVersion | None = None
    """A version that gets a share of the traffic."""
    share: float = Field(0.0, ge=0, lt=1)
    """The candidate's share."""
    previous: ServedVersion | None = None
    """The version for a rollback; its engines keep running."""

    @property
    def versions(self) -> Versions:
        """The same as the gateway's state."""
        return Versions.from_dict(self.model_dump(exclude={"serving"}))


class EngineArguments(Section):
    """Arguments of the engines of one version."""

    serving: ServingConfig
    """The endpoint's config."""
    version: ServedVersion
    """The version to serve."""


class RewardArguments(Section):
    """Arguments of the reward model's application."""

    serving: ServingConfig
    """The endpoint's config, with a `reward_model`."""


def gateway(arguments: dict[str, Any]) -> Application:
    """Build the gateway from `GatewayArguments`. Keys come from the environment of the cluster's nodes.

    Raises:
        ValidationError, KeysError: naming what is wrong.
    """
    parsed = GatewayArguments.model_validate(arguments)
    variable = parsed.serving.keys_env
    keys = None if variable is None else read_keys(variable, os.environ)
    if keys == {}:
        raise KeysError(
            f"{variable} is not set on the cluster's nodes; set it to name:key there, or set serving.keys_env to null"
        )
    return build_gateway(parsed.serving, keys, parsed.versions)


def engines(arguments: dict[str, Any]) -> Application:
    """Build the engines of a version from `EngineArguments`."""
    parsed = EngineArguments.model_validate(arguments)
    return build_policy(parsed.serving, Version(**parsed.version.model_dump()))


def rewards(arguments: dict[str, Any]) -> Application:
    """Build the reward model's application from `RewardArguments`."""
    return build_rewards(RewardArguments.model_validate(arguments).serving)


def serve_config(config: ServingConfig, versions: Versions) -> dict[str, Any]:
    """The content of a config file for `serve deploy`, which is also a RayService's `serveConfigV2`."""
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
