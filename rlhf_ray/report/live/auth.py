"""Who may look: everybody where there are no keys, otherwise whoever has shown one.

Invariants: a key in an address is answered by a redirect to the same address without it, never by a page; no script can
read the cookie, and no other site makes a browser send it.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import parse_qsl, quote, unquote, urlencode

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from rlhf_ray.report.live.pages import SHELL, Page
from rlhf_ray.report.page import fill
from rlhf_ray.serving.guard import digest

COOKIE = "rlhf_ray_key"
PARAMETER = "key"


class Door:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, keys: Mapping[str, str] | None) -> None:
        """`keys`: digest to name; None: everybody may look."""
        self.app, self.keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self.keys is None:
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        shown = request.query_params.get(PARAMETER)
        if shown is not None:
            answer = _enter(request, shown) if self._fits(shown) else respond(_refusal("This key is not known."))
            await answer(scope, receive, send)
        elif self._fits(unquote(request.cookies.get(COOKIE, ""))) or self._fits(_bearer(request)):
            await self.app(scope, receive, send)
        else:
            await respond(_refusal("Open the address that `rlhf-ray watch` printed, or enter a key."))(
                scope, receive, send
            )

    def _fits(self, key: str) -> bool:
        # Digests are compared by looking them up: how long that takes says nothing of a key.
        return digest(key) in self.keys


def respond(page: Page, tag: str | None = None) -> Response:
    """The page with the headers that all pages have."""
    headers = {"cache-control": "no-cache, private", "vary": "cookie"} | SAFE_HEADERS
    if tag is not None:
        headers["etag"] = f'W/"{tag}"'
    return Response(page.body, page.status, headers, "text/html")


SAFE_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": f"{SHELL.policy}; frame-ancestors 'none'",
}


def _refusal(text: str) -> Page:
    return Page(fill("key.html.jinja", SHELL, text=text), 401)


def _bearer(request: Request) -> str:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _enter(request: Request, key: str) -> Response:
    rest = urlencode([pair for pair in parse_qsl(request.url.query) if pair[0] != PARAMETER])
    # Relative to what was asked for: behind a proxy only the browser knows the whole address.
    place = request.url.path.rpartition("/")[2] or "./"
    answer = RedirectResponse(f"{place}?{rest}" if rest else place, 303, SAFE_HEADERS | {"cache-control": "no-store"})
    answer.set_cookie(
        COOKIE, quote(key, safe=""), path=f"{request.scope.get('root_path', '')}/", httponly=True, samesite="strict",
        secure=request.url.scheme == "https",
    )  # fmt: skip
    return answer
