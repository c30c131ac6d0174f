"""`EngineThread`: vLLM in this process, stepped by a thread of its own.

Invariants: only this thread calls vLLM, so no lock is needed and every action runs between two steps; a request joins the
running batch at once (continuous batching); after a failed step the engine is not used any more.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
from vllm import EngineArgs, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.v1.engine.llm_engine import LLMEngine

from rlhf_ray.rollout.requests import EngineFailed

Deliver = Callable[[list[Any] | Exception], None]
"""Called in the engine's thread with the results that finished since the last call, or with the error that ended them."""

_DELIVERY_INTERVAL_S = 0.1
"""Interval at which finished results are delivered while others are still being generated: each delivery lets the receiving
thread interrupt the stepping one."""


class EngineThread:
    """An engine, its thread and its requests. Methods marked *(engine thread)* may only be called in an action given to `do`."""

    def __init__(self, arguments: EngineArgs) -> None:
        """Start the engine; returns when it can generate."""
        self._running: dict[str, tuple[Deliver, Callable[[RequestOutput], Any]]] = {}
        self._finished: dict[Deliver, list[Any]] = defaultdict(list)
        self._delivered_at = 0.0
        self._added = 0
        self._failure: EngineFailed | None = None
        self._inbox: queue.SimpleQueue[tuple[Callable[[], Any], Future] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="rollout-engine", daemon=True)
        self._thread.start()
        self.llm: LLMEngine = self.do(lambda: LLMEngine.from_engine_args(arguments)).result()

    def do(self, action: Callable[[], Any]) -> Future:
        """Run an action in the engine's thread, between two steps."""
        future: Future = Future()
        self._inbox.put((action, future))
        return future

    def close(self) -> None:
        """Stop the thread, then the engine and its processes; running requests are not answered."""
        self._inbox.put(None)
        self._thread.join()
        self.llm.engine_core.shutdown()

    @property
    def running(self) -> int:
        """Number of sequences that are being generated (engine thread)."""
        return len(self._running)

    def add(
        self,
        token_ids: np.ndarray,
        parameters: SamplingParams,
        deliver: Deliver,
        convert: Callable[[RequestOutput], Any],
        lora: LoRARequest | None = None,
    ) -> str:
        """Add a request (engine thread); `deliver` gets its output after `convert`. Returns a handle for `abort`."""
        if self._failure is not None:
            raise self._failure
        handle = str(self._added)
        self._added += 1
        self.llm.add_request(handle, {"prompt_token_ids": token_ids.tolist()}, parameters, lora_request=lora)
        self._running[handle] = (deliver, convert)
        return handle

    def abort(self, handles: Sequence[str]) -> None:
        """Stop those of these requests that have not finished (engine thread); they are not delivered."""
        self.llm.abort_request([handle for handle in handles if self._running.pop(handle, None) is not None])

    def call_workers(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of each of vLLM's workers (engine thread)."""
        return self.llm.collective_rpc(method, args=arguments)

    def _run(self) -> None:
        while self._serve_inbox():
            if self._running:
                self._step()

    def _serve_inbox(self) -> bool:
        """Run the actions that were asked for; if nothing is being generated, wait for one. Returns False after `close`."""
        while not self._running or not self._inbox.empty():
            item = self._inbox.get()
            if item is None:
                return False
            action, future = item
            try:
                future.set_result(action())
            except Exception as error:
                future.set_exception(error)
        return True

    def _step(self) -> None:
        try:
            outputs = self.llm.step()
        except Exception as error:
            self._fail(error)
            return
        for output in outputs:
            deliver, convert = self._running.pop(output.request_id)
            self._finished[deliver].append(convert(output))
        if not self._running or time.monotonic() - self._delivered_at >= _DELIVERY_INTERVAL_S:
            self._deliver()

    def _deliver(self) -> None:
        for deliver, results in self._finished.items():
            deliver(results)
        self._finished.clear()
        self._delivered_at = time.monotonic()

    def _fail(self, error: Exception) -> None:
        self._deliver()
        self._failure = EngineFailed(f"vLLM failed in a forward pass: {type(error).__name__}: {error}")
        for deliver in {deliver for deliver, _ in self._running.values()}:
            deliver(self._failure)
        self._running.clear()
