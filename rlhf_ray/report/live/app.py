"""The live page as a web application, and as an application of Ray Serve on the node whose folder it shows.

It has two addresses: `./` lists all runs, and `runs?run=NAME` shows one run, or several side by side.

Invariants: only GET is answered; a visitor from another machine needs a key; other applications of the cluster are left as they
are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import ray
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from ray import serve
from starlette.exceptions import HTTPException
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import Response

from rlhf_ray.errors import InputError
from rlhf_ray.report.live.auth import SECURITY_HEADERS, KeyAuth, page_response
from rlhf_ray.report.live.pages import Page, Pages, message_page
from rlhf_ray.serving.guard import digest, new_key, read_keys

LOOPBACK = ("127.0.0.1", "localhost")
"""Names by which a machine addresses itself."""
NAME = "rlhf-ray-watch"
"""Start of the name of the Serve application; its route prefix follows."""
_SHARED_PREFIX = "/watch"
"""Route prefix on clusters that other applications share: `/` belongs to the endpoint."""


class AlreadyWatched(InputError, RuntimeError):
    """The cluster already shows a live page."""


@dataclass(frozen=True)
class LiveSite:
    """The live page of one folder on a cluster. Use `open`, then `start`."""

    root: Path
    host: str
    port: int
    keys: Mapping[str, str] | None
    """Name by digest of the key. None: everyone on this machine may open the page."""
    made_key: str | None
    """The key that was generated because there was none. It is shown only once."""
    shared: bool
    """Whether others may serve from this cluster too, at a host and port of their choice."""

    @classmethod
    def open(cls, root: Path, host: str, port: int, keys_env: str, shared: bool) -> LiveSite:
        """Decide which keys are valid. This process must be connected to a cluster.

        Args:
            keys_env: environment variable that holds the keys.
            shared: whether others use the cluster too.

        Raises:
            KeysError: the variable cannot be read.
            AlreadyWatched: the cluster shows a live page already.
        """
        if f"{NAME}{_SHARED_PREFIX}" in serve.status().applications:
            raise AlreadyWatched(f"this cluster already shows a live page at {_SHARED_PREFIX}/; end that one first")
        keys, made = read_keys(keys_env), None
        if not keys and (shared or host not in LOOPBACK):
            made = new_key()
            keys = {digest(made): "default"}
        return cls(root.absolute(), host, port, keys or None, made, shared)

    @property
    def prefix(self) -> str:
        """Route prefix of the page."""
        return _SHARED_PREFIX if self.shared else "/"

    def start(self) -> str:
        """Start the page; returns its address when it answers."""
        if not serve.status().proxies:
            location = "EveryNode" if self.shared else "HeadOnly"
            serve.start(proxy_location=location, http_options={"host": self.host, "port": self.port})
        root, keys = str(self.root), self.keys

        def build() -> FastAPI:
            return build_app(root, keys)

        this_node = ray.get_runtime_context().get_node_id()
        deployment = serve.deployment(
            serve.ingress(build)(),
            name="Watch",
            num_replicas=1,
            max_ongoing_requests=100,
            ray_actor_options={"num_cpus": 0, "label_selector": {"ray.io/node-id": this_node}},
        )
        serve.run(deployment.bind(), name=f"{NAME}{self.prefix}", route_prefix=self.prefix)
        place = "the host and port of this cluster's Serve, at " if self.shared else f"http://{self.host}:{self.port}"
        return f"{place}{self.prefix.rstrip('/')}/" + (f"?key={quote(self.made_key)}" if self.made_key else "")

    def stop(self) -> None:
        """Remove the page, and shut Serve down if it has no other applications."""
        serve.delete(f"{NAME}{self.prefix}")
        if not serve.status().applications:
            serve.shutdown()


def build_app(root: str, keys: Mapping[str, str] | None) -> FastAPI:
    """Build the application for a folder of runs, or for one run.

    Args:
        keys: name by digest of the key. None lets everyone in who uses a name of this machine, so that no other site can make a
            browser fetch the page under a name of its own.
    """
    pages = Pages(root)
    app = FastAPI(title="rlhf-ray watch", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(GZipMiddleware, minimum_size=1000)
    app.add_middleware(KeyAuth, keys=keys)
    if keys is None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK), www_redirect=False)

    # Not coroutines: files are read in a thread, so that other requests are not blocked.
    @app.get("/")
    def overview(request: Request) -> Response:
        return _answer(*pages.overview(_known_tag(request)))

    @app.get("/runs")
    def chosen(request: Request, run: Annotated[list[str], Query(max_length=64)] = []) -> Response:  # noqa: B006
        return _answer(*pages.chosen(run, _known_tag(request)))

    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _refused)
    app.add_exception_handler(Exception, _failed)
    return app


def _known_tag(request: Request) -> str | None:
    return request.headers.get("if-none-match", "").removeprefix("W/").strip('"') or None


def _answer(tag: str, page: Page | None) -> Response:
    if page is None:
        return Response(status_code=304, headers=SECURITY_HEADERS | {"etag": f'W/"{tag}"'})
    return page_response(page, tag)


async def _refused(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 400)
    text = {404: "There is nothing at this address.", 405: "Only GET is allowed."}.get(status, str(error))
    answer = _answer(str(status), message_page("Request refused", text, status))
    answer.headers.update(getattr(error, "headers", None) or {})
    return answer


async def _failed(request: Request, error: Exception) -> Response:
    """Answer an unexpected error, which also goes to the server's log."""
    text = f"{type(error).__name__}: {error}. The log of the server has the details."
    return _answer("failed", message_page("This page could not be drawn", text, 500))
