"""Access to the live page: everyone may open it if there are no keys, otherwise only who has sent a valid key.

Invariants: a key in an address is answered with a redirect to the same address without the key, never with a page; no script
can read the cookie, and no other site can make a browser send it.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import parse_qsl, quote, unquote, urlencode

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from rlhf_ray.report.live.pages import LAYOUT, Page
from rlhf_ray.report.page import render_template
from rlhf_ray.serving.guard import digest

COOKIE = "rlhf_ray_key"
PARAMETER = "key"
SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": f"{LAYOUT.policy}; frame-ancestors 'none'",
}


class KeyAuth:
    """ASGI middleware that lets requests with a valid key pass: in the address, in the cookie or as a bearer token."""

    def __init__(self, app: ASGIApp, keys: Mapping[str, str] | None) -> None:
        """`keys`: name by digest of the key. None lets every request pass."""
        self.app, self.keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self.keys is None:
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        key = request.query_params.get(PARAMETER)
        if key is not None:
            answer = _set_cookie(request, key) if self._is_valid(key) else _refusal("This key is not valid.")
            await answer(scope, receive, send)
        elif self._is_valid(unquote(request.cookies.get(COOKIE, ""))) or self._is_valid(_bearer_token(request)):
            await self.app(scope, receive, send)
        else:
            answer = _refusal("Open the address that `rlhf-ray watch` printed, or enter a key.")
            await answer(scope, receive, send)

    def _is_valid(self, key: str) -> bool:
        # A lookup of digests takes a time that tells nothing about the keys.
        return self.keys is not None and digest(key) in self.keys


def page_response(page: Page, tag: str | None = None) -> Response:
    """A page with the headers that all pages have."""
    headers = {"cache-control": "no-cache, private", "vary": "cookie"} | SECURITY_HEADERS
    if tag is not None:
        headers["etag"] = f'W/"{tag}"'
    return Response(page.body, page.status, headers, "text/html")


def _refusal(text: str) -> Response:
    return page_response(Page(render_template("key.html.jinja", LAYOUT, text=text), 401))


def _bearer_token(request: Request) -> str:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _set_cookie(request: Request, key: str) -> Response:
    """Redirect to the same address without the key, and keep the key in a cookie."""
    rest = urlencode([pair for pair in parse_qsl(request.url.query) if pair[0] != PARAMETER])
    # Relative to the requested address: behind a proxy only the browser knows the whole address.
    place = request.url.path.rpartition("/")[2] or "./"
    headers = SECURITY_HEADERS | {"cache-control": "no-store"}
    answer = RedirectResponse(f"{place}?{rest}" if rest else place, 303, headers)
    answer.set_cookie(
        COOKIE, quote(key, safe=""), path=f"{request.scope.get('root_path', '')}/", httponly=True, samesite="strict",
        secure=request.url.scheme == "https",
    )  # fmt: skip
    return answer
