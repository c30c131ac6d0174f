"""Which requests pass the guard and how others are refused; on a real ASGI application, without engines."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from fastapi import FastAPI, Request

from rlhf_ray.config.serving import LimitsConfig
from rlhf_ray.serving.guard import Guard, KeysError, digest, new_key, read_keys

pytestmark = pytest.mark.anyio

KEY = "a-key-of-a-nurse-1"
KEYS = {digest(KEY): "nurse", digest("a-key-of-a-clerk-2"): "clerk"}
AS_NURSE = {"authorization": f"Bearer {KEY}"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def guarded(keys: dict[str, str] | None = KEYS, **limits: float) -> tuple[Guard, httpx.AsyncClient, asyncio.Event]:
    """A guard before an application that answers `/wait` when the event is set, and counts bytes at `/count`."""
    app, go = FastAPI(), asyncio.Event()

    @app.get("/health")
    async def health() -> str:
        return "ok"

    @app.get("/wait")
    async def wait() -> str:
        await go.wait()
        return "done"

    @app.post("/count")
    async def count(request: Request) -> int:
        return len(await request.body())

    guard = Guard(app, keys, LimitsConfig(**limits))
    return guard, httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url="http://endpoint"), go


@pytest.mark.parametrize("header", [None, "Bearer wrong", KEY, f"Basic {KEY}", "Bearer"])
async def test_requests_without_a_valid_key_are_refused(header):
    _, client, _ = guarded()
    refused = await client.post("/count", content=b"x", headers={} if header is None else {"authorization": header})
    assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
    assert refused.json()["error"]["type"] == "invalid_request_error" and KEY not in refused.text
    assert (await client.get("/health")).status_code == 200, "the health check needs no key"


async def test_requests_with_a_key_or_to_an_open_endpoint_pass():
    _, client, _ = guarded()
    assert (await client.post("/count", content=b"abc", headers=AS_NURSE)).json() == 3
    _, client, _ = guarded(keys=None)
    assert (await client.post("/count", content=b"abc")).json() == 3


async def test_each_key_has_its_own_rate_limit():
    _, client, _ = guarded(requests_per_minute=2)
    statuses = [(await client.post("/count", headers=AS_NURSE)).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]
    refused = await client.post("/count", headers=AS_NURSE)
    assert 1 <= int(refused.headers["retry-after"]) <= 61 and refused.json()["error"]["type"] == "rate_limit_error"
    other = await client.post("/count", headers={"authorization": "Bearer a-key-of-a-clerk-2"})
    assert other.status_code == 200


async def test_requests_above_the_limit_in_flight_are_refused_at_once():
    guard, client, go = guarded(in_flight=2)
    waiting = [asyncio.create_task(client.get("/wait", headers=AS_NURSE)) for _ in range(2)]
    while guard.in_flight < 2:
        await asyncio.sleep(0)
    refused = await client.get("/wait", headers=AS_NURSE)
    assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
    go.set()
    assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [200, 200]
    assert guard.in_flight == 0 and (await client.get("/wait", headers=AS_NURSE)).status_code == 200


async def test_a_large_body_is_refused_even_without_a_length():
    guard, client, _ = guarded(body_kb=1)

    async def chunks():
        for _ in range(5):
            yield b"x" * 300

    with_length = await client.post("/count", content=b"x" * 1025, headers=AS_NURSE)
    without_length = await client.post("/count", content=chunks(), headers=AS_NURSE)
    assert with_length.status_code == without_length.status_code == 413 and "1 KiB" in without_length.text
    assert (await client.post("/count", content=b"x" * 1024, headers=AS_NURSE)).json() == 1024
    assert guard.in_flight == 0


def test_keys_come_from_the_environment_and_are_never_shown():
    made = new_key()
    keys = read_keys("KEYS", {"KEYS": f"nurse:{made}, clerk:a-key-of-a-clerk-2"})
    assert keys == {digest(made): "nurse", digest("a-key-of-a-clerk-2"): "clerk"}
    assert read_keys("KEYS", {}) == {} and new_key() != made
    for wrong in ("nurse:short-secret", "secret-without-a-name", ":secret-of-nobody-at-all"):
        with pytest.raises(KeysError, match="entry 2") as refused:
            read_keys("KEYS", {"KEYS": f"nurse:{made},{wrong}"})
        assert "secret" not in str(refused.value)
