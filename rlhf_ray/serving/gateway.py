"""The gateway: OpenAI's API in front of every version.

Invariants: each answer names the version that gave it, in `model` and in the header `x-policy-version`; which versions there are
comes from Serve's `user_config`, so it changes without a restart and every gateway has it before a publication returns.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from ray import serve
from ray.llm._internal.serve.core.configs.openai_api_models import OpenAIHTTPException
from ray.serve import Application
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.llm.ingress import OpenAiIngress, make_fastapi_ingress
from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from rlhf_ray.config.serving import ServingConfig
from rlhf_ray.serving.guard import Guard, error_body
from rlhf_ray.serving.rewards import ScoreRequest
from rlhf_ray.serving.versions import Version, Versions, draw_of

HEADER = "x-policy-version"
REWARDS = "reward-model"
"""Names the application that scores answers."""


class Gateway(OpenAiIngress):
    """One process of the gateway."""

    def __init__(
        self, config: ServingConfig, keys: Mapping[str, str] | None, runtime_env: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__({}, {})
        self.config, self.keys, self.runtime_env = config, keys, runtime_env or {}
        self.name, self.limits = config.name, config.limits
        self.rewards: DeploymentHandle | None = None
        self.versions: Versions | None = None
        self.began = int(time.time())
        self.answering: Counter[str] = Counter()

    async def reconfigure(self, versions: dict[str, Any]) -> None:
        """Take over which versions there are. Serve calls it at the start and at every change, beside requests."""
        new = Versions.from_dict(versions)
        patience_s = self.config.start_s
        handles = {v.name: (await started(self.name, v.name, patience_s)).options(stream=True) for v in new.alive}
        if self.config.reward_model is not None and self.rewards is None:
            self.rewards = await started(self.name, REWARDS, patience_s)
        # Handles first: a request may see either state, and one that chose a version before it changed still finds it.
        self._configured_serve_handles = self._configured_serve_handles | handles
        self.versions = new

    async def state(self) -> dict[str, Any]:
        """For whoever publishes."""
        return self.versions.as_dict()

    async def settings(self) -> tuple[ServingConfig, Mapping[str, str] | None, Mapping[str, Any]]:
        """What the endpoint was started with."""
        return self.config, self.keys, self.runtime_env

    async def in_flight(self, version: str) -> int:
        """Requests that the version is answering for this gateway."""
        return self.answering[version]

    async def health(self) -> dict[str, str]:
        """That the endpoint is there; it needs no key."""
        return {"status": "ok"}

    async def models(self) -> dict[str, Any]:
        """The endpoint's name, which is routed, and every version by its own name."""
        alive = self.versions.alive
        shares = {self.versions.stable.name: 1.0 - self.versions.share}
        if self.versions.candidate is not None:
            shares[self.versions.candidate.name] = self.versions.share
        entries = [{"id": self.name, "versions": shares}]
        entries += [{"id": version.name, "share": shares.get(version.name, 0.0)} for version in alive]
        common = {"object": "model", "created": self.began, "owned_by": "rlhf_ray"}
        return {"object": "list", "data": [entry | common for entry in entries]}

    async def chat(self, body: ChatCompletionRequest, request: Request) -> Response:
        """Chat completions."""
        asked = [n for n in (body.max_completion_tokens, body.max_tokens) if n is not None]
        body.max_completion_tokens = self._allowed(max(asked, default=None), body.n)
        body.max_tokens = None
        return await self._answer(body, "chat", request)

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Completions."""
        several = isinstance(body.prompt, list) and not isinstance(next(iter(body.prompt), None), int)
        prompts = len(body.prompt) if several else 1
        body.max_tokens = self._allowed(body.max_tokens, (body.n or 1) * prompts)
        return await self._answer(body, "completions", request)

    async def score(self, body: ScoreRequest) -> dict[str, Any]:
        """Rewards of answers."""
        if self.rewards is None:
            raise HTTPException(404, "this endpoint serves no reward model; start it with reward_model=FOLDER")
        if len(body.prompts) != len(body.responses):
            raise HTTPException(400, f"{len(body.prompts)} prompts for {len(body.responses)} responses")
        scores = await self.rewards.score.remote(body)
        if isinstance(scores, str):
            raise HTTPException(400, scores)
        return {"scores": scores}

    async def _answer(self, body: Any, method: str, request: Request) -> Response:
        version = self._version(body.model, body.user)
        body.model = version.name
        self.answering[version.name] += 1
        try:
            response = await self._process_llm_request(body, method, request)
        except BaseException:
            self.answering[version.name] -= 1
            raise
        response.headers[HEADER] = version.name
        if isinstance(response, StreamingResponse):
            response.body_iterator = self._until_end(response.body_iterator, version)
        else:
            self.answering[version.name] -= 1
        return response

    async def _until_end(self, chunks: Any, version: Version) -> Any:
        try:
            async for chunk in chunks:
                yield chunk
        finally:
            self.answering[version.name] -= 1

    def _version(self, model: str | None, user: str | None) -> Version:
        if model in (None, "", self.name):
            return self.versions.choose(random.random() if user is None else draw_of(user))
        version = self.versions.named(model)
        if version is None:
            known = ", ".join([self.name, *(v.name for v in self.versions.alive)])
            raise HTTPException(404, f"there is no model {model!r}; there are {known}")
        return version

    def _allowed(self, tokens: int | None, choices: int | None) -> int | None:
        if tokens is not None and not 1 <= tokens <= self.limits.max_tokens:
            raise HTTPException(400, f"max_tokens is {tokens}; from 1 to {self.limits.max_tokens} are allowed")
        if (choices or 1) > self.limits.choices:
            raise HTTPException(
                400, f"{choices} answers are asked for (n of each prompt); at most {self.limits.choices} are allowed"
            )
        return tokens

    async def _get_model_id(self, model: str | None) -> str:
        return model

    def _get_configured_serve_handle(self, model_id: str) -> DeploymentHandle:
        return self._configured_serve_handles[model_id]


async def started(endpoint: str, part: str, patience_s: float) -> DeploymentHandle:
    """A handle to one of an endpoint's applications. They start all at once, so the gateway may come first.

    Raises:
        RayServeException: it did not come.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return serve.get_app_handle(application(endpoint, part))
        except RayServeException:
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(0.5)


def application(endpoint: str, part: str) -> str:
    """Name of one of an endpoint's Serve applications. Serve names files after it; no endpoint has a dot in its name."""
    return f"{endpoint}.{part}"


def build_gateway(
    config: ServingConfig,
    keys: Mapping[str, str] | None,
    versions: Versions,
    runtime_env: Mapping[str, Any] | None = None,
) -> Application:
    """The application that has the endpoint's route.

    Args:
        keys: digest to name; None: everybody may ask.
        runtime_env: of the endpoint's processes, for whoever publishes.
    """
    routes = {
        "health": lambda app: app.get("/health"),
        "models": lambda app: app.get("/v1/models"),
        "chat": lambda app: app.post("/v1/chat/completions"),
        "completions": lambda app: app.post("/v1/completions"),
        "score": lambda app: app.post("/v1/score"),
    }
    ingress = make_fastapi_ingress(Gateway, endpoint_map=routes, app=_fastapi(config, keys))
    deployment = serve.deployment(
        ingress,
        name="Gateway",
        num_replicas=config.gateways,
        max_ongoing_requests=2 * config.limits.in_flight,
        user_config=versions.as_dict(),
        ray_actor_options={"num_cpus": 0.1},
        graceful_shutdown_timeout_s=config.limits.timeout_s,
    )
    # With the same code Serve hands a new `user_config` to running replicas; otherwise it would start others.
    same_code = hashlib.sha256(f"{config.model_dump_json()}{sorted(keys or {})}".encode()).hexdigest()[:16]
    return deployment.options(version=same_code, _internal=True).bind(config, keys, runtime_env)


def _fastapi(config: ServingConfig, keys: Mapping[str, str] | None) -> FastAPI:
    app = FastAPI(title=config.name, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, keys=keys, limits=config.limits)
    if config.cors_origins:
        # Outermost: a browser asks what it may before it has a key to show.
        app.add_middleware(
            CORSMiddleware, allow_origins=config.cors_origins, allow_methods=["GET", "POST"],
            allow_headers=["*"], expose_headers=[HEADER],
        )  # fmt: skip

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        said = "; ".join(f"{'.'.join(map(str, e['loc'][1:]))}: {e['msg']}" for e in error.errors()[:5])
        return JSONResponse(error_body(400, said), 400)

    @app.exception_handler(BackPressureError)
    async def busy(request: Request, error: BackPressureError) -> JSONResponse:
        return JSONResponse(error_body(503, "all engines are busy; try again soon"), 503, {"retry-after": "1"})

    @app.exception_handler(Exception)
    async def refused(request: Request, error: Exception) -> JSONResponse:
        # The errors of `ray.serve.llm` and HTTPException say their status; whatever has none is a fault of the server.
        status = getattr(error, "status_code", 500)
        said = getattr(error, "message", None) or getattr(error, "detail", None)
        return JSONResponse(error_body(status, str(said or "the server failed; its log says why")), status)

    # By class, or they would pass outside of the middleware for web pages.
    for refusal in (HTTPException, OpenAIHTTPException):
        app.add_exception_handler(refusal, refused)
    return app
