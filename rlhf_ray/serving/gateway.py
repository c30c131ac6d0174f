"""The gateway: OpenAI's API in front of all versions.

Invariants: each response names the version that answered, in `model` and in the header `x-policy-version`. The versions are in
Serve's `user_config`, so they change without a restart, and every gateway has them before a publication returns.
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
"""Name of the application that scores responses."""


class Gateway(OpenAiIngress):
    """One replica of the gateway."""

    def __init__(
        self, config: ServingConfig, keys: Mapping[str, str] | None, runtime_env: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__({}, {})
        self.config, self.keys, self.runtime_env = config, keys, runtime_env or {}
        self.name, self.limits = config.name, config.limits
        self.rewards: DeploymentHandle | None = None
        self._versions: Versions | None = None
        self.began = int(time.time())
        self.answering: Counter[str] = Counter()

    async def reconfigure(self, versions: dict[str, Any]) -> None:
        """Change the versions. Serve calls this at the start and at every change, while requests are answered."""
        new = Versions.from_dict(versions)
        timeout_s = self.config.start_s
        handles = {v.name: (await started(self.name, v.name, timeout_s)).options(stream=True) for v in new.alive}
        if self.config.reward_model is not None and self.rewards is None:
            self.rewards = await started(self.name, REWARDS, timeout_s)
        # Handles first, and old ones stay: a request that has chosen an old version still finds its handle.
        self._configured_serve_handles.update(handles)
        self._versions = new

    @property
    def versions(self) -> Versions:
        """The current versions."""
        assert self._versions is not None, "Serve calls reconfigure before it sends requests"
        return self._versions

    async def state(self) -> dict[str, Any]:
        """The current versions, for processes that publish."""
        return self.versions.as_dict()

    async def settings(self) -> tuple[ServingConfig, Mapping[str, str] | None, Mapping[str, Any]]:
        """The arguments that the endpoint was started with."""
        return self.config, self.keys, self.runtime_env

    async def in_flight(self, version: str) -> int:
        """Number of open requests of this gateway that the version is answering."""
        return self.answering[version]

    async def health(self) -> dict[str, str]:
        """Whether the endpoint is up. Needs no key."""
        return {"status": "ok"}

    async def models(self) -> dict[str, Any]:
        """The endpoint's name, whose requests are shared between versions, and every version by its own name."""
        alive = self.versions.alive
        shares = {self.versions.stable.name: 1.0 - self.versions.share}
        if self.versions.candidate is not None:
            shares[self.versions.candidate.name] = self.versions.share
        entries: list[dict[str, Any]] = [{"id": self.name, "versions": shares}]
        entries += [{"id": version.name, "share": shares.get(version.name, 0.0)} for version in alive]
        common = {"object": "model", "created": self.began, "owned_by": "rlhf_ray"}
        return {"object": "list", "data": [entry | common for entry in entries]}

    async def chat(self, body: ChatCompletionRequest, request: Request) -> Response:
        """Chat completions."""
        limits = [n for n in (body.max_completion_tokens, body.max_tokens) if n is not None]
        body.max_completion_tokens = self._allowed(max(limits, default=None), body.n)
        body.max_tokens = None
        return await self._answer(body, "chat", request)

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Text completions."""
        several = isinstance(body.prompt, list) and not isinstance(next(iter(body.prompt), None), int)
        prompts = len(body.prompt) if several else 1
        body.max_tokens = self._allowed(body.max_tokens, (body.n or 1) * prompts)
        return await self._answer(body, "completions", request)

    async def score(self, body: ScoreRequest) -> dict[str, Any]:
        """Rewards of responses."""
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
        except BaseException as error:
            self.answering[version.name] -= 1
            status, message = getattr(error, "status_code", None), getattr(error, "message", None)
            if isinstance(status, int) and isinstance(
                message, str
            ):  # the errors of `ray.serve.llm`; their class is not public
                raise HTTPException(status, message) from error
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
            raise HTTPException(404, f"there is no model {model!r}; choose one of {known}")
        return version

    def _allowed(self, tokens: int | None, choices: int | None) -> int | None:
        if tokens is not None and not 1 <= tokens <= self.limits.max_tokens:
            raise HTTPException(400, f"max_tokens is {tokens}; from 1 to {self.limits.max_tokens} are allowed")
        if (choices or 1) > self.limits.choices:
            raise HTTPException(
                400, f"{choices} responses are requested (n for each prompt); at most {self.limits.choices} are allowed"
            )
        return tokens

    async def _get_model_id(self, model: str) -> str:
        return model

    def _get_configured_serve_handle(self, model_id: str) -> DeploymentHandle:
        return self._configured_serve_handles[model_id]


async def started(endpoint: str, part: str, timeout_s: float) -> DeploymentHandle:
    """A handle to one of an endpoint's applications. They start at the same time, so the gateway may be the first.

    Raises:
        RayServeException: the application did not start in time.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return serve.get_app_handle(application(endpoint, part))
        except RayServeException:
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(0.5)


def application(endpoint: str, part: str) -> str:
    """Name of one of an endpoint's Serve applications. It can be a file name; endpoints' names have no dot."""
    return f"{endpoint}.{part}"


def build_gateway(
    config: ServingConfig,
    keys: Mapping[str, str] | None,
    versions: Versions,
    runtime_env: Mapping[str, Any] | None = None,
) -> Application:
    """The application that receives the requests.

    Args:
        keys: callers' names by the digest of their keys; None: no key is needed.
        runtime_env: the endpoint's Ray runtime environment, for processes that publish later.
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
    # With an unchanged version Serve sends a new `user_config` to running replicas; otherwise it would replace them.
    same_code = hashlib.sha256(f"{config.model_dump_json()}{sorted(keys or {})}".encode()).hexdigest()[:16]
    return deployment.options(version=same_code, _internal=True).bind(config, keys, runtime_env)


def _fastapi(config: ServingConfig, keys: Mapping[str, str] | None) -> FastAPI:
    app = FastAPI(title=config.name, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, keys=keys, limits=config.limits)
    if config.cors_origins:
        # Outermost, because browsers send preflight requests without a key.
        app.add_middleware(
            CORSMiddleware, allow_origins=config.cors_origins, allow_methods=["GET", "POST"],
            allow_headers=["*"], expose_headers=[HEADER],
        )  # fmt: skip

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'][1:]))}: {e['msg']}" for e in error.errors()[:5])
        return JSONResponse(error_body(400, problems), 400)

    @app.exception_handler(BackPressureError)
    async def busy(request: Request, error: BackPressureError) -> JSONResponse:
        return JSONResponse(error_body(503, "all engines are busy; try again later"), 503, {"retry-after": "1"})

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(error_body(error.status_code, str(error.detail)), error.status_code)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(error_body(500, "the server failed; see its log for the reason"), 500)

    return app
