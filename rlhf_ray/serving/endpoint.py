"""Starting, changing and ending an endpoint, from whatever process is connected to its Ray cluster.

Invariant: traffic moves only to engines that answer, and engines end only when nothing is asked of them any more, so no request
is lost by a change.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus

from rlhf_ray.config.serving import ServingConfig
from rlhf_ray.errors import InputError
from rlhf_ray.serving.deploying import hand_over, wait_for
from rlhf_ray.serving.gateway import REWARDS, application, build_gateway
from rlhf_ray.serving.policy import build_policy
from rlhf_ray.serving.rewards import build_rewards
from rlhf_ray.serving.versions import Version, VersionError, Versions

_POLL_S = 0.2
_SETTLE_S = 1.0
"""After the gateways know: requests that had chosen a version are with its engines by then, and counted."""


class NoEndpoint(InputError, RuntimeError):
    """The cluster serves nothing of that name."""


class EndpointTaken(InputError, RuntimeError):
    """The cluster serves already, otherwise than it is asked to."""


class Endpoint:
    """One endpoint by its configuration."""

    def __init__(
        self, config: ServingConfig, keys: Mapping[str, str] | None, runtime_env: Mapping[str, Any] | None = None
    ) -> None:
        """`keys`: digest to name; None: everybody may ask. `runtime_env`: of its processes; None: that of this one."""
        self.config, self.keys = config, keys
        self.runtime_env = ray.get_runtime_context().runtime_env if runtime_env is None else runtime_env
        self.give_up: Callable[[], bool] = lambda: False
        """Whether not to wait any longer for what is starting."""

    @classmethod
    def attach(cls, name: str) -> Endpoint:
        """The endpoint that is running under a name.

        Raises:
            NoEndpoint: there is none.
        """
        return cls(*gateway_of(name).settings.remote().result(timeout_s=30))

    def start(self, version: Version) -> None:
        """Bring up the gateway, the engines of the first version and the reward model; returns when they answer.

        Raises:
            EndpointTaken, RouteTaken: the cluster serves something else there; before engines start.
            NotStarted: nothing is left of what had started.
        """
        self._check_name(version)
        self._check_free()
        serve.start(
            proxy_location="EveryNode",
            http_options={
                "host": self.config.host,
                "port": self.config.port,
                "request_timeout_s": self.config.limits.timeout_s,
            },
        )
        listens = _get_global_client().http_config
        if (listens.host, listens.port) != (self.config.host, self.config.port):
            raise EndpointTaken(
                f"Serve of this cluster listens at {listens.host}:{listens.port}, not at {self.config.host}:{self.config.port}; "
                f"set host={listens.host} port={listens.port}"
            )
        try:
            self._hand_over_gateway(Versions(version))  # waits for the engines; first, because the route may be taken
            self._run(build_policy(self.config, version), version.name)
            if self.config.reward_model is not None:
                self._run(build_rewards(self.config), REWARDS)
            wait_for(self._gateway, self.config.start_s, self.give_up)
        except BaseException:
            self.stop()
            raise

    def _check_name(self, version: Version) -> None:
        if version.name == self.config.name:
            raise VersionError(f"{version.name!r} is the endpoint's name; give the version another one by --label")

    def _check_free(self) -> None:
        if self._gateway in serve.status().applications:
            raise EndpointTaken(
                f"this cluster serves {self.config.name!r} already; `rlhf-ray publish` gives it a version, `rlhf-ray unserve` "
                "ends it"
            )

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
            NotStarted: they did not come up; what was served before is still served.
        """
        self._check_name(version)
        self.versions.published(version, share)
        name = application(self.config.name, version.name)
        if name in serve.status().applications:
            raise VersionError(
                f"engines of a version named {version.name!r} are starting or ending; wait, or give this one another name by "
                "--label"
            )
        self._run(build_policy(self.config, version), version.name)
        try:
            before = self.versions  # engines take their time to start; meanwhile others may have published or promoted
            return self._change(before, before.published(version, share))
        except BaseException:
            if self.versions.named(version.name) is None:
                serve.delete(name, _blocking=False)
            raise

    def promote(self) -> Versions:
        """All traffic to the candidate."""
        before = self.versions
        return self._change(before, before.promoted())

    def roll_back(self) -> Versions:
        """All traffic away from the candidate, or back to the previous version."""
        before = self.versions
        return self._change(before, before.rolled_back())

    def stop(self) -> None:
        """End all of its applications, the gateway first; what they have begun they finish."""
        mine = application(self.config.name, "")
        names = [name for name in serve.status().applications if name.startswith(mine)]
        for name in sorted(names, key=lambda name: name != self._gateway):
            serve.delete(name, _blocking=False)

    def _change(self, before: Versions, after: Versions) -> Versions:
        self._route(after)
        alive = {version.name for version in after.alive}
        for version in before.alive:
            if version.name not in alive:
                self._retire(version)
        return after

    def _retire(self, version: Version) -> None:
        """End a version that gets no more requests, when it has answered those it got; its replicas finish what is left.

        Meanwhile somebody else may have given it traffic again: then it stays.
        """
        time.sleep(_SETTLE_S)
        deadline = time.monotonic() + self.config.drain_s
        while time.monotonic() < deadline and self._is_answering(version):
            time.sleep(_POLL_S)
        if self.versions.named(version.name) is None:
            serve.delete(application(self.config.name, version.name), _blocking=False)

    def _is_answering(self, version: Version) -> bool:
        """What some of the gateways say: a request reaches one of them, so with several it takes more than one to know."""
        gateway, asks = gateway_of(self.config.name), 4 * self.config.gateways if self.config.gateways > 1 else 1
        answers = [gateway.in_flight.remote(version.name) for _ in range(asks)]
        try:
            return any([answer.result(timeout_s=30) for answer in answers])
        except TimeoutError:  # a gateway that does not find the time to say it is busy
            return True

    @property
    def _gateway(self) -> str:
        return application(self.config.name, "gateway")

    def _route(self, versions: Versions) -> None:
        """Tell every gateway; with the same code Serve changes those that run."""
        self._hand_over_gateway(versions)
        wait_for(self._gateway, self.config.start_s, self.give_up)

    def _hand_over_gateway(self, versions: Versions) -> None:
        built = build_gateway(self.config, self.keys, versions, self.runtime_env)
        hand_over(built, self._gateway, self.runtime_env, route="/")

    def _run(self, built: serve.Application, part: str) -> None:
        name = application(self.config.name, part)
        hand_over(built, name, self.runtime_env)
        try:
            wait_for(name, self.config.start_s, self.give_up)
        except BaseException:
            serve.delete(name, _blocking=False)
            raise


def gateway_of(name: str) -> DeploymentHandle:
    """The gateway of a running endpoint.

    Raises:
        NoEndpoint: this cluster has none of that name.
    """
    found = serve.status().applications.get(application(name, "gateway"))
    if found is None or found.status not in (ApplicationStatus.RUNNING, ApplicationStatus.DEPLOYING):
        raise NoEndpoint(f"this cluster serves no endpoint {name!r}; start one by `rlhf-ray serve`")
    return serve.get_app_handle(application(name, "gateway"))
