"""Calls of environments, in threads, with limits on their number and time; every error becomes an `EnvironmentFailed`.

Invariant: neither the event loop nor the end of the process waits for an environment's code: a thread that hangs is abandoned
and only its episode is lost.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from rlhf_ray.algorithms.registry import import_named
from rlhf_ray.config.rollout import EnvironmentConfig
from rlhf_ray.environments.base import Environment, EnvironmentFailed, Message, Step, checked_step, messages_of
from rlhf_ray.types import Prompt, RolloutRequest

Result = TypeVar("Result")


def resolve_class(path: str) -> type:
    """The class that `package.module:Class` names.

    Raises:
        ValueError: the module cannot be imported, or has no such class, or the class has no `reset` or `step`.
    """
    found = import_named(path, "environment")
    if not isinstance(found, type):
        raise ValueError(f"environment {path!r} is not a class but {type(found).__name__}")
    missing = [method for method in ("reset", "step") if not callable(getattr(found, method, None))]
    if missing:
        raise ValueError(f"environment {path!r} has no method {' and no '.join(missing)}")
    return found


def check_environment(config: EnvironmentConfig) -> None:
    """Create an environment to see that it works.

    Raises:
        ValueError: there is no such class, or it does not accept these arguments.
    """
    try:
        resolve_class(config.factory)(**config.arguments)
    except TypeError as error:
        raise ValueError(f"environment {config.factory!r} does not accept these arguments: {error}") from error


class EnvironmentCalls:
    """Calls `reset` and `step` for all episodes of a run. Belongs to one event loop."""

    def __init__(self, config: EnvironmentConfig) -> None:
        self.config = config
        self._class = resolve_class(config.factory)
        self._free = asyncio.Semaphore(config.concurrency)

    async def reset(self, request: RolloutRequest) -> tuple[Environment, tuple[Message, ...]]:
        """A new environment and its opening messages."""

        def begin(prompt: Prompt, seed: int) -> tuple[Environment, tuple[Message, ...]]:
            environment = self._class(**self.config.arguments)
            return environment, messages_of(environment.reset(prompt, seed) or ())

        return await self._call("reset", request.id, begin, request.prompt, request.seed)

    async def step(self, environment: Environment, response: str, rollout_id: str) -> Step:
        """The environment's checked answer to a turn of the policy."""
        return await self._call("step", rollout_id, lambda: checked_step(environment.step(response)))

    async def _call(self, method: str, rollout_id: str, function: Callable[..., Result], *arguments: Any) -> Result:
        async with self._free:
            try:
                async with asyncio.timeout(self.config.timeout_s):
                    result = await in_thread(function, *arguments)
            except TimeoutError:
                # Only the time limit raises this: an error of the environment is returned as a result.
                result = TimeoutError(f"no answer within {self.config.timeout_s:g} s (environment.timeout_s)")
        if isinstance(result, Exception):
            reason = f"{method} failed: {type(result).__name__}: {result}"
            raise EnvironmentFailed(self.config.factory, reason, rollout_id) from result
        return result


def in_thread(function: Callable[..., Result], *arguments: Any) -> asyncio.Future[Result | Exception]:
    """Run a function in a new thread; the future's result is what it returned, or the exception that it raised."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Result | Exception] = loop.create_future()

    def settle(result: Result | Exception) -> None:
        if not future.done():
            future.set_result(result)

    def work() -> None:
        try:
            result: Result | Exception = function(*arguments)
        except Exception as error:
            # User code may raise anything; the caller decides what it means.
            result = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, result)

    # Unlike the threads of an executor, a daemon thread that never ends does not keep the process alive.
    threading.Thread(target=work, name="environment", daemon=True).start()
    return future
