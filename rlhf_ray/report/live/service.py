"""The live page as an application of Ray Serve, on the node whose folder it shows.

Invariants: who is not on this machine needs a key; what else the cluster serves is left as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import ray
from ray import serve

from rlhf_ray.errors import InputError
from rlhf_ray.report.live.app import LOOPBACK, build_app
from rlhf_ray.serving.guard import digest, new_key, read_keys

NAME = "rlhf-ray-watch"
"""Begins the names of its Serve applications; where they are ends them."""
_BESIDE_OTHERS = "/watch"
"""Where the page is on a cluster that serves already: `/` is the endpoint's."""


class SiteTaken(InputError, RuntimeError):
    """The cluster shows a live page already."""


@dataclass(frozen=True)
class LiveSite:
    """One page for one folder. Use `open`, then `start`."""

    root: Path
    host: str
    port: int
    keys: Mapping[str, str] | None
    """Digest to name; None: everybody on this machine."""
    made_key: str | None
    """A key that was made because there was none; shown once."""
    shared: bool
    """Whether others may serve from this cluster, at a host and port of their choice."""

    @classmethod
    def open(cls, root: Path, host: str, port: int, keys_env: str, shared: bool) -> LiveSite:
        """Decide who may look, from the keys in an environment variable; this process is connected to a cluster.

        Args:
            shared: whether the cluster is there for others, too.

        Raises:
            KeysError: the variable cannot be read.
            SiteTaken: there is such a page beside what the cluster serves.
        """
        if f"{NAME}{_BESIDE_OTHERS}" in serve.status().applications:
            raise SiteTaken(f"this cluster shows a live page already, at {_BESIDE_OTHERS}/; end that one first")
        keys, made = read_keys(keys_env), None
        if not keys and (shared or host not in LOOPBACK):
            made = new_key()
            keys = {digest(made): "default"}
        return cls(root.absolute(), host, port, keys or None, made, shared)

    @property
    def prefix(self) -> str:
        """Where the page is below the host."""
        return _BESIDE_OTHERS if self.shared else "/"

    def start(self) -> str:
        """Bring the page up; returns its address when it answers."""
        if not serve.status().proxies:
            where = "EveryNode" if self.shared else "HeadOnly"
            serve.start(proxy_location=where, http_options={"host": self.host, "port": self.port})
        root, keys = str(self.root), self.keys

        def build():
            return build_app(root, keys)

        here = ray.get_runtime_context().get_node_id()
        deployment = serve.deployment(
            serve.ingress(build)(),
            name="Watch",
            num_replicas=1,
            max_ongoing_requests=100,
            ray_actor_options={"num_cpus": 0, "label_selector": {"ray.io/node-id": here}},
        )
        serve.run(deployment.bind(), name=f"{NAME}{self.prefix}", route_prefix=self.prefix)
        place = "the host and port of this cluster's Serve, at " if self.shared else f"http://{self.host}:{self.port}"
        return f"{place}{self.prefix.rstrip('/')}/" + (f"?key={quote(self.made_key)}" if self.made_key else "")

    def stop(self) -> None:
        """Take the page away, and Serve with it where nothing else is served."""
        serve.delete(f"{NAME}{self.prefix}")
        if not serve.status().applications:
            serve.shutdown()
