"""Starting, changing and ending an endpoint, from whatever process is connected to its Ray cluster.

Invariant: traffic moves only to engines that answer, and engines end only when nothing is asked of them any more, so no request
is lost by a change.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus

from rlhf_ray.config.serving import ServingConfig
from rlhf_ray.errors import InputError
from rlhf_ray.serving.gateway import REWARDS, application, build_gateway
from rlhf_ray.serving.policy import build_policy
from rlhf_ray.serving.rewards import build_rewards
from rlhf_ray.serving.versions import Version, Versions

_POLL_S = 0.2
_SHOWN = 2000
"""Characters of the reason why engines did not start."""
_SETTLE_S = 1.0
"""After the gateways know: requests that had chosen a version are with its engines by then, and counted."""


class NoEndpoint(InputError, RuntimeError):
    """The cluster serves nothing of that name."""


class NotStarted(RuntimeError):
    """Engines of a version failed at their start; what was served before is still served."""


class Endpoint:
    """One endpoint by its configuration."""

    def __init__(self, config: ServingConfig, keys: Mapping[str, str] | None) -> None:
        """`keys`: digest to name; None: everybody may ask."""
        self.config, self.keys = config, keys

    @classmethod
    def attach(cls, name: str) -> Endpoint:
        """The endpoint that is running under a name.

        Raises:
            NoEndpoint: there is none.
        """
        config, keys = gateway_of(name).settings.remote().result(timeout_s=30)
        return cls(config, keys)

    def start(self, version: Version) -> None:
        """Bring up the engines of the first version, the reward model and the gateway; returns when they answer."""
        serve.start(
            proxy_location="EveryNode",
            http_options={
                "host": self.config.host,
                "port": self.config.port,
                "request_timeout_s": self.config.limits.timeout_s,
            },
        )
        self._run(build_policy(self.config, version), version.name)
        if self.config.reward_model is not None:
            self._run(build_rewards(self.config), REWARDS)
        self._route(Versions(version))

    @property
    def versions(self) -> Versions:
        """Those that the gateway has.

        Raises:
            NoEndpoint: there is no gateway.
        """
        return Versions.from_dict(gateway_of(self.config.name).state.remote().result(timeout_s=30))

    def publish(self, version: Version, share: float = 1.0) -> Versions:
        """Start its engines, and give it a share of the traffic when they answer.

        Raises:
            VersionError: as `Versions.published`.
        """
        self.versions.published(version, share)
        self._run(build_policy(self.config, version), version.name)
        before = self.versions  # engines take their time to start; meanwhile others may have published or promoted
        return self._change(before, before.published(version, share))

    def promote(self) -> Versions:
        """All traffic to the candidate."""
        before = self.versions
        return self._change(before, before.promoted())

    def roll_back(self) -> Versions:
        """All traffic away from the candidate, or back to the previous version."""
        before = self.versions
        return self._change(before, before.rolled_back())

    def stop(self) -> None:
        """End all of its applications."""
        for name in list(serve.status().applications):
            if name.startswith(application(self.config.name, "")):
                serve.delete(name)

    def _change(self, before: Versions, after: Versions) -> Versions:
        self._route(after)
        alive = {version.name for version in after.alive}
        for version in before.alive:
            if version.name not in alive:
                self._retire(version)
        return after

    def _retire(self, version: Version) -> None:
        """End a version that gets no more requests, when it has answered those it got."""
        time.sleep(_SETTLE_S)
        deadline = time.monotonic() + self.config.drain_s
        while time.monotonic() < deadline and any(self._in_flight(version)):
            time.sleep(_POLL_S)
        serve.delete(application(self.config.name, version.name))

    def _in_flight(self, version: Version) -> list[int]:
        """What some of the gateways say: a request reaches one of them, so with several it takes more than one to know."""
        gateway, asks = gateway_of(self.config.name), 4 * self.config.gateways if self.config.gateways > 1 else 1
        answers = [gateway.in_flight.remote(version.name) for _ in range(asks)]
        return [answer.result(timeout_s=30) for answer in answers]

    def _route(self, versions: Versions) -> None:
        """Tell every gateway; with the same code Serve changes those that run."""
        name = application(self.config.name, "gateway")
        serve.run(build_gateway(self.config, self.keys, versions), name=name, route_prefix="/")

    def _run(self, built: serve.Application, part: str) -> None:
        name = application(self.config.name, part)
        try:
            serve.run(built, name=name, route_prefix=None)
        except RuntimeError as error:
            reasons = [d.message for d in serve.status().applications[name].deployments.values() if d.message]
            serve.delete(name)
            raise NotStarted(f"{part} did not start: {error} {' '.join(reasons)[-_SHOWN:]}") from error


def gateway_of(name: str) -> DeploymentHandle:
    """The gateway of a running endpoint.

    Raises:
        NoEndpoint: this cluster has none of that name.
    """
    found = serve.status().applications.get(application(name, "gateway"))
    if found is None or found.status not in (ApplicationStatus.RUNNING, ApplicationStatus.DEPLOYING):
        raise NoEndpoint(f"this cluster serves no endpoint {name!r}; start one by `rlhf-ray serve`")
    return serve.get_app_handle(application(name, "gateway"))
