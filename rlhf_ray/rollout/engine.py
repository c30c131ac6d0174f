"""`RolloutEngine`: vLLM in this process, stepped by one thread of ours.

Invariants: vLLM is touched by the engine's thread alone, so no lock is needed and everything it is asked happens
between two steps; a request is added to the running batch at once (continuous batching); no token is sampled between
the beginning of a weight update and its complete end.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Literal

import numpy as np
from vllm.outputs import RequestOutput
from vllm.v1.engine.llm_engine import LLMEngine

from rlhf_ray.config.rollout import RolloutConfig, SamplingConfig
from rlhf_ray.rollout.errors import EngineBusy, EngineFailed, TornWeights
from rlhf_ray.rollout.samples import Sample, SampleRequest, check_prompt
from rlhf_ray.rollout.vllm_arguments import end_tokens, engine_arguments, probe_parameters, sampling_parameters
from rlhf_ray.rollout.weights.bucket import WeightBucket
from rlhf_ray.types import PolicyVersion

Deliver = Callable[[list[Any] | Exception], None]
"""Receives, in the engine's thread, what finished lately, or the reason why nothing more will come."""

Route = Literal["buckets", "native"]
"""How weights come: in our buckets, or by one of vLLM's own transfer engines."""

_DELIVERY_INTERVAL_S = 0.1
"""While sequences are being generated, those that finished are handed over this often: each time, the receiving thread
interrupts the stepping one."""

_BEGIN = {"buckets": "begin_reload", "native": "start_weight_update"}
_FINISH = {"buckets": "finish_reload", "native": "finish_weight_update"}


class RolloutEngine:
    """Token ids in; token ids, log-probabilities and policy versions out."""

    def __init__(self, model: str, config: RolloutConfig, context: int, version: PolicyVersion = 0) -> None:
        """Load `model` (a Hugging Face folder holding policy `version`); returns when it can generate."""
        self.context = context
        self.version: PolicyVersion | None = version
        self._ends = end_tokens(model)
        self._route: Route = "buckets"
        self._running: dict[str, tuple[Deliver, Callable[[RequestOutput], Any]]] = {}
        self._finished: dict[Deliver, list[Any]] = defaultdict(list)
        self._delivered_at = 0.0
        self._submitted = 0
        self._failure: EngineFailed | None = None
        self._inbox: queue.SimpleQueue[tuple[Callable[[], Any], Future] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._live, name="rollout-engine", daemon=True)
        self._thread.start()
        self.do(lambda: self._start(model, config)).result()

    def do(self, action: Callable[[], Any]) -> Future:
        """Run an action in the engine's thread, between two steps."""
        future: Future = Future()
        self._inbox.put((action, future))
        return future

    def generate(self, requests: Sequence[SampleRequest], sampling: SamplingConfig, deliver: Deliver) -> Future:
        """Add requests to the running batch, all or none; `deliver` gets lists of `Sample`. Resolves to their handles.

        Raises (in the future):
            PromptRefused: a prompt does not fit; none of the requests was added.
            TornWeights: a weight update is not complete.
            EngineFailed: the engine died earlier.
        """
        return self.do(lambda: self._generate(requests, sampling, deliver))

    def abort(self, handles: Sequence[str]) -> Future:
        """Stop what has not finished of these; it is delivered nowhere."""
        return self.do(lambda: self._abort(handles))

    def probe(self, token_ids: np.ndarray) -> Future:
        """float32 [T−1]: log-probabilities, at temperature 1, of tokens 1… of one sequence under the weights of now."""
        answer: Future = Future()

        def deliver(finished: list[Any] | Exception) -> None:
            if isinstance(finished, Exception):
                answer.set_exception(finished)
            else:
                answer.set_result(finished[0])

        def add() -> None:
            try:
                check_prompt(SampleRequest("probe", token_ids, 0), self.context)
                self._add(token_ids, probe_parameters(), deliver, partial(_prompt_logprobs, token_ids))
            except Exception as error:
                answer.set_exception(error)

        self.do(add)
        return answer

    def start_weight_update(self, route: Route = "buckets") -> Future:
        """Open the engine for new weights; from now on it refuses to generate.

        Raises (in the future):
            EngineBusy: sequences are being generated.
        """
        return self.do(lambda: self._start_update(route))

    def load_bucket(self, bucket: WeightBucket) -> Future:
        """Load some of the weights."""
        return self.do(lambda: self._update("load_bucket", bucket))

    def update_weights(self, update_info: dict[str, Any]) -> Future:
        """Let vLLM's own transfer engine receive what `update_info` announces."""
        return self.do(lambda: self._update("update_weights", update_info))

    def finish_weight_update(self, version: PolicyVersion) -> Future:
        """Put the new weights to work as policy `version`."""
        return self.do(lambda: self._finish_update(version))

    def worker_call(self, method: str, *arguments: Any) -> Future:
        """Call a method of vLLM's workers; one result for each."""
        return self.do(lambda: self._llm.collective_rpc(method, args=arguments))

    def close(self) -> None:
        """Stop the thread and let go of the engine; what still runs is not answered."""
        self._inbox.put(None)
        self._thread.join()
        self._llm.engine_core.shutdown()

    def _live(self) -> None:
        while self._serve_inbox():
            if self._running:
                self._step()

    def _serve_inbox(self) -> bool:
        """Do what was asked; wait for something to do where nothing runs. False: the end."""
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
            outputs = self._llm.step()
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
        self._failure.__cause__ = error
        for deliver in {deliver for deliver, _ in self._running.values()}:
            deliver(self._failure)
        self._running.clear()

    def _start(self, model: str, config: RolloutConfig) -> None:
        self._llm = LLMEngine.from_engine_args(engine_arguments(model, config, self.context))
        self.vocabulary: int = self._llm.model_config.get_vocab_size()

    def _generate(self, requests: Sequence[SampleRequest], sampling: SamplingConfig, deliver: Deliver) -> list[str]:
        for request in requests:
            check_prompt(request, self.context)
        return [
            self._add(
                request.token_ids,
                sampling_parameters(sampling, request.seed, self._ends),
                deliver,
                partial(_sample, request.id, self.version),
            )
            for request in requests
        ]

    def _add(self, token_ids: np.ndarray, parameters: Any, deliver: Deliver, convert: Callable) -> str:
        self._check_usable()
        handle = str(self._submitted)
        self._submitted += 1
        self._llm.add_request(handle, {"prompt_token_ids": token_ids.tolist()}, parameters)
        self._running[handle] = (deliver, convert)
        return handle

    def _abort(self, handles: Sequence[str]) -> None:
        unfinished = [handle for handle in handles if self._running.pop(handle, None) is not None]
        self._llm.abort_request(unfinished)

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self.version is None:
            raise TornWeights(
                "a weight update began and has not finished; finish it, or publish again, before generating"
            )

    def _start_update(self, route: Route) -> None:
        if self._running:
            raise EngineBusy(
                f"{len(self._running)} sequences are being generated; weights can change only when none is. "
                "Wait for the running `generate` calls to end"
            )
        if self.version is None:
            self._llm.collective_rpc("abandon_update")
        self.version, self._route = None, route
        self._llm.collective_rpc(_BEGIN[route])

    def _update(self, method: str, payload: Any) -> None:
        if self.version is not None:
            raise RuntimeError(
                "weights came without a weight update having been started; call start_weight_update first"
            )
        self._llm.collective_rpc(method, args=(payload,))

    def _finish_update(self, version: PolicyVersion) -> None:
        if self.version is not None:
            raise RuntimeError("finish_weight_update without start_weight_update")
        self._llm.collective_rpc(_FINISH[self._route])
        self._llm.reset_prefix_cache()
        self.version = version


def _sample(request_id: str, version: PolicyVersion, output: RequestOutput) -> Sample:
    completion = output.outputs[0]
    token_ids = np.asarray(completion.token_ids, dtype=np.int32)
    # With `logprobs=0` each position has one entry: the sampled token's.
    logprobs = np.asarray(completion.logprobs.logprobs, dtype=np.float32)
    versions = np.full(len(token_ids), version, dtype=np.int32)
    return Sample(request_id, token_ids, logprobs, versions, completion.finish_reason)


def _prompt_logprobs(token_ids: np.ndarray, output: RequestOutput) -> np.ndarray:
    entries = zip(output.prompt_logprobs[1:], token_ids[1:].tolist(), strict=True)
    return np.asarray([entry[token].logprob for entry, token in entries], dtype=np.float32)
