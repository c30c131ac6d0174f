"""The web application: two addresses, `./` with all runs and `runs?run=NAME` with one, or several side by side.

Invariant: only GET is answered.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import Response

from rlhf_ray.report.live.auth import SAFE_HEADERS, Door, respond
from rlhf_ray.report.live.pages import Page, Pages, message

LOOPBACK = ("127.0.0.1", "localhost")
"""Names by which a machine speaks of itself."""


def build_app(root: str, keys: Mapping[str, str] | None) -> FastAPI:
    """The application for a folder of runs, or one run.

    Args:
        keys: digest to name. None: everybody may look who reaches it under a name of this machine, so that no other
            site can make a browser fetch it under a name of its own.
    """
    pages = Pages(root)
    app = FastAPI(title="rlhf-ray watch", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(GZipMiddleware, minimum_size=1000)
    app.add_middleware(Door, keys=keys)
    if keys is None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK), www_redirect=False)

    # Not coroutines: files are read in a thread, and other requests go on.
    @app.get("/")
    def overview(request: Request) -> Response:
        return _answer(*pages.overview(_known(request)))

    @app.get("/runs")
    def chosen(request: Request, run: Annotated[list[str], Query(max_length=64)] = []) -> Response:  # noqa: B006
        return _answer(*pages.chosen(run, _known(request)))

    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _refused)
    app.add_exception_handler(Exception, _failed)
    return app


def _known(request: Request) -> str | None:
    return request.headers.get("if-none-match", "").removeprefix("W/").strip('"') or None


def _answer(tag: str, page: Page | None) -> Response:
    if page is None:
        return Response(status_code=304, headers=SAFE_HEADERS | {"etag": f'W/"{tag}"'})
    return respond(page, tag)


async def _refused(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 400)
    text = {404: "There is nothing at this address.", 405: "Only GET is answered."}.get(status, str(error))
    answer = _answer(str(status), message("Not here", text, status))
    answer.headers.update(getattr(error, "headers", None) or {})
    return answer


async def _failed(request: Request, error: Exception) -> Response:
    """The error itself goes to the server's log."""
    text = f"{type(error).__name__}: {error}. The log of the server says where."
    return _answer("failed", message("This page could not be drawn", text, 500))
