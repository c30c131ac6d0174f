"""Starting, changing and stopping an endpoint, from any process that is connected to its Ray cluster.

Invariant: traffic moves only to engines that are ready, and engines stop only when they have no open requests, so no change loses
a request.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus

from rlhf_ray.config.serving import ServingConfig
from rlhf_ray.errors import InputError
from rlhf_ray.serving.deploying import deploy, http_address, wait_until_running
from rlhf_ray.serving.gateway import REWARDS, application, build_gateway
from rlhf_ray.serving.policy import build_policy
from rlhf_ray.serving.rewards import build_rewards
from rlhf_ray.serving.versions import Version, VersionError, Versions

_POLL_S = 0.2
_SETTLE_S = 1.0
"""Wait after the gateways have changed: by then, requests that had chosen the old version are counted as in flight."""


class NoEndpoint(InputError, RuntimeError):
    """The cluster has no endpoint of this name."""


class EndpointTaken(InputError, RuntimeError):
    """The cluster already serves, with other settings."""


class Endpoint:
    """A handle to one endpoint."""

    def __init__(
        self, config: ServingConfig, keys: Mapping[str, str] | None, runtime_env: Mapping[str, Any] | None = None
    ) -> None:
        """Describe the endpoint; `start` starts it.

        Args:
            keys: callers' names by the digest of their keys; None: no key is needed.
            runtime_env: Ray runtime environment of its processes; None: that of this process.
        """
        self.config, self.keys = config, keys
        self.runtime_env = ray.get_runtime_context().runtime_env if runtime_env is None else runtime_env
        self.give_up: Callable[[], bool] = lambda: False
        """Checked while something starts: True stops the wait."""

    @classmethod
    def attach(cls, name: str) -> Endpoint:
        """The running endpoint of this name.

        Raises:
            NoEndpoint: there is none.
        """
        return cls(*gateway_of(name).settings.remote().result(timeout_s=30))

    def start(self, version: Version) -> None:
        """Start the gateway, the engines of the first version and the reward model; return when they are ready.

        Raises:
            EndpointTaken, RouteTaken: the cluster already serves something else there. Raised before engines start.
            NotStarted: something did not start; everything that had started is stopped again.
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
        host, port = http_address()
        if (host, port) != (self.config.host, self.config.port):
            raise EndpointTaken(
                f"Serve of this cluster listens at {host}:{port}, not at {self.config.host}:{self.config.port}; "
                f"set host={host} port={port}"
            )
        try:
            self._deploy_gateway(Versions(version))  # first, because its route may be in use; it waits for the engines
            self._run(build_policy(self.config, version), version.name)
            if self.config.reward_model is not None:
                self._run(build_rewards(self.config), REWARDS)
            wait_until_running(self._gateway, self.config.start_s, self.give_up)
        except BaseException:
            self.stop()
            raise

    def _check_name(self, version: Version) -> None:
        if version.name == self.config.name:
            raise VersionError(
                f"{version.name!r} is the endpoint's own name; give the version another one with --label"
            )

    def _check_free(self) -> None:
        if self._gateway in serve.status().applications:
            raise EndpointTaken(
                f"this cluster already serves {self.config.name!r}; `rlhf-ray publish` adds a version, `rlhf-ray unserve` "
                "stops it"
            )

    @property
    def versions(self) -> Versions:
        """The versions in the gateway's state.

        Raises:
            NoEndpoint: there is no gateway.
        """
        return Versions.from_dict(gateway_of(self.config.name).state.remote().result(timeout_s=30))

    def publish(self, version: Version, share: float = 1.0) -> Versions:
        """Start the engines of a new version, and give it a share of the traffic when they are ready.

        Raises:
            VersionError: as `Versions.published`.
            NotStarted: the engines did not start; the versions from before are still served.
        """
        self._check_name(version)
        self.versions.published(version, share)
        name = application(self.config.name, version.name)
        if name in serve.status().applications:
            raise VersionError(
                f"engines of a version named {version.name!r} are starting or stopping; wait, or give this one another name with "
                "--label"
            )
        self._run(build_policy(self.config, version), version.name)
        try:
            before = self.versions  # others may have published or promoted while the engines started
            return self._change(before, before.published(version, share))
        except BaseException:
            if self.versions.named(version.name) is None:
                serve.delete(name, _blocking=False)
            raise

    def promote(self) -> Versions:
        """Give the candidate all the traffic."""
        before = self.versions
        return self._change(before, before.promoted())

    def roll_back(self) -> Versions:
        """Remove the candidate, or return to the previous version."""
        before = self.versions
        return self._change(before, before.rolled_back())

    def stop(self) -> None:
        """Stop all applications of the endpoint, the gateway first; they finish their open requests."""
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
        """Stop a version that gets no new requests, after it has answered the open ones.

        It is kept if somebody has given it traffic again in the meantime.
        """
        time.sleep(_SETTLE_S)
        deadline = time.monotonic() + self.config.drain_s
        while time.monotonic() < deadline and self._is_answering(version):
            time.sleep(_POLL_S)
        if self.versions.named(version.name) is None:
            serve.delete(application(self.config.name, version.name), _blocking=False)

    def _is_answering(self, version: Version) -> bool:
        """Whether a gateway has open requests for the version. A call reaches one of them, so with several it is repeated."""
        gateway, calls = gateway_of(self.config.name), 4 * self.config.gateways if self.config.gateways > 1 else 1
        answers = [gateway.in_flight.remote(version.name) for _ in range(calls)]
        try:
            return any([answer.result(timeout_s=30) for answer in answers])
        except TimeoutError:  # a gateway that does not respond in time is busy
            return True

    @property
    def _gateway(self) -> str:
        return application(self.config.name, "gateway")

    def _route(self, versions: Versions) -> None:
        """Change the versions in every gateway. The code is the same, so Serve updates the running replicas."""
        self._deploy_gateway(versions)
        wait_until_running(self._gateway, self.config.start_s, self.give_up)

    def _deploy_gateway(self, versions: Versions) -> None:
        built = build_gateway(self.config, self.keys, versions, self.runtime_env)
        deploy(built, self._gateway, self.runtime_env, route="/")

    def _run(self, built: serve.Application, part: str) -> None:
        name = application(self.config.name, part)
        deploy(built, name, self.runtime_env)
        try:
            wait_until_running(name, self.config.start_s, self.give_up)
        except BaseException:
            serve.delete(name, _blocking=False)
            raise


def gateway_of(name: str) -> DeploymentHandle:
    """The gateway of a running endpoint.

    Raises:
        NoEndpoint: this cluster has no endpoint of this name.
    """
    found = serve.status().applications.get(application(name, "gateway"))
    if found is None or found.status not in (ApplicationStatus.RUNNING, ApplicationStatus.DEPLOYING):
        raise NoEndpoint(f"this cluster serves no endpoint {name!r}; start one with `rlhf-ray serve`")
    return serve.get_app_handle(application(name, "gateway"))
