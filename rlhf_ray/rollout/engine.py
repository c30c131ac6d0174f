"""`RolloutEngine`: turns prompts into responses with log-probabilities and policy versions, and takes new weights.

Invariants: no token is sampled from the start of a weight update until it is complete; every token carries the version of the
weights that sampled it; weights change only while nothing is being generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Literal

import numpy as np
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput

from rlhf_ray.config.learner import LoraConfig
from rlhf_ray.config.rollout import RolloutConfig, SamplingConfig
from rlhf_ray.rollout.engine_thread import Deliver, EngineThread
from rlhf_ray.rollout.requests import EngineBusy, EngineOutput, EngineRequest, TornWeights, check_prompt
from rlhf_ray.rollout.vllm_arguments import end_tokens, engine_arguments, probe_parameters, sampling_parameters
from rlhf_ray.types import PolicyVersion
from rlhf_ray.weights.bucket import WeightBucket
from rlhf_ray.weights.receiving import AdapterSlot

Route = Literal["buckets", "native", "adapter"]
"""How weights arrive: in buckets, by one of vLLM's own transfer engines, or, in buckets too, as an adapter of the base model."""

_BEGIN = {"buckets": "begin_reload", "native": "start_weight_update"}
_FINISH = {"buckets": "finish_reload", "native": "finish_weight_update"}


class RolloutEngine:
    """One vLLM engine. Every method returns a future at once."""

    def __init__(
        self,
        model: str,
        config: RolloutConfig,
        context: int,
        version: PolicyVersion = 0,
        lora: LoraConfig | None = None,
    ) -> None:
        """Load `model`, a Hugging Face folder of policy `version`; returns when the engine can generate.

        With `lora`, weight updates bring adapters of that model.
        """
        self.context = context
        self.version: PolicyVersion | None = version
        self._ends = end_tokens(model)
        self._route: Route = "buckets"
        self._adapter = AdapterSlot(lora) if lora is not None else None
        self._base_replaced = False
        self._engine_thread = EngineThread(engine_arguments(model, config, context, lora))
        self.vocabulary: int = self._engine_thread.llm.model_config.get_vocab_size()
        self.close = self._engine_thread.close

    def generate(
        self, requests: Sequence[EngineRequest], sampling: SamplingConfig, deliver: Deliver
    ) -> Future[list[str]]:
        """Add requests to the running batch; `deliver` gets lists of `EngineOutput`. Resolves to handles for `abort`.

        The prompts must have passed `check_prompt`, as `RolloutPool.generate` makes sure.

        Raises (in the future):
            TornWeights: a weight update is not complete.
            EngineFailed: the engine died earlier.
        """
        return self._engine_thread.do(lambda: self._generate(requests, sampling, deliver))

    def abort(self, handles: Sequence[str]) -> Future[None]:
        """Stop those of these requests that have not finished; they are not delivered."""
        return self._engine_thread.do(lambda: self._engine_thread.abort(handles))

    def probe(self, token_ids: np.ndarray) -> Future[np.ndarray]:
        """float32 [T−1]: log-probabilities, at temperature 1, of tokens 1… of one sequence.

        Raises (in the future):
            PromptRefused: the sequence does not fit.
            TornWeights, EngineFailed: see `generate`.
        """
        answer: Future[np.ndarray] = Future()

        def deliver(finished: list[np.ndarray] | Exception) -> None:
            if isinstance(finished, Exception):
                answer.set_exception(finished)
            else:
                answer.set_result(finished[0])

        def report(added: Future) -> None:
            if added.exception() is not None:
                answer.set_exception(added.exception())

        self._engine_thread.do(lambda: self._probe(token_ids, deliver)).add_done_callback(report)
        return answer

    def start_weight_update(self, route: Route = "buckets") -> Future[None]:
        """Begin a weight update; until it is finished the engine refuses to generate.

        Raises (in the future):
            EngineBusy: sequences are being generated.
        """
        return self._engine_thread.do(lambda: self._start_update(route))

    def load_bucket(self, bucket: WeightBucket) -> Future[None]:
        """Load some of the weights."""
        return self._engine_thread.do(lambda: self._update("load_bucket", bucket))

    def update_weights(self, update_info: Any) -> Future[None]:
        """Let vLLM's own transfer engine receive the weights that `update_info` describes."""
        return self._engine_thread.do(lambda: self._update("update_weights", update_info))

    def finish_weight_update(self, version: PolicyVersion) -> Future[None]:
        """Put the new weights to use as policy `version`."""
        return self._engine_thread.do(lambda: self._finish_update(version))

    def init_native_transfer(self, init_info: dict[str, Any]) -> Future[list[None]]:
        """Connect to a learner by vLLM's own transfer engine; the engine is blocked meanwhile."""
        return self._engine_thread.do(
            lambda: self._engine_thread.call_workers("init_weight_transfer_engine", init_info)
        )

    def _generate(self, requests: Sequence[EngineRequest], sampling: SamplingConfig, deliver: Deliver) -> list[str]:
        version = self._known_version()
        return [
            self._engine_thread.add(
                request.token_ids,
                sampling_parameters(sampling, request.seed, self._ends),
                deliver,
                partial(_output, request.id, version),
                self._lora_request,
            )
            for request in requests
        ]

    def _probe(self, token_ids: np.ndarray, deliver: Deliver) -> None:
        self._known_version()
        check_prompt("probe", token_ids, self.context, self.vocabulary)
        convert = partial(_prompt_logprobs, token_ids)
        self._engine_thread.add(token_ids, probe_parameters(), deliver, convert, self._lora_request)

    @property
    def _lora_request(self) -> LoRARequest | None:
        return None if self._adapter is None else self._adapter.request

    @property
    def _arriving_adapter(self) -> AdapterSlot:
        if self._adapter is None:
            raise RuntimeError("an adapter arrived at an engine that was started without `lora`")
        return self._adapter

    def _known_version(self) -> PolicyVersion:
        if self.version is None:
            raise TornWeights("a weight update began and did not finish; send the weights again before generating")
        return self.version

    def _start_update(self, route: Route) -> None:
        if self._engine_thread.running:
            raise EngineBusy(
                f"{self._engine_thread.running} sequences are being generated; weights can change only when none is. "
                "Wait for the running `generate` calls to end"
            )
        if route == "adapter" and self._base_replaced:
            raise RuntimeError(
                "an adapter arrived at an engine whose base model was replaced by a folder's weights; adapters belong to the "
                "model that the engine was started with"
            )
        if self.version is None and self._route != "adapter":
            self._engine_thread.call_workers("abandon_update")
        self.version, self._route = None, route
        if route == "adapter":
            self._arriving_adapter.begin()
        else:
            self._engine_thread.call_workers(_BEGIN[route])

    def _update(self, method: str, payload: Any) -> None:
        if self.version is not None:
            raise RuntimeError("weights arrived outside a weight update; call start_weight_update first")
        if self._route == "adapter":
            self._arriving_adapter.add(payload)
        else:
            self._engine_thread.call_workers(method, payload)

    def _finish_update(self, version: PolicyVersion) -> None:
        if self.version is not None:
            raise RuntimeError("finish_weight_update without start_weight_update")
        if self._route == "adapter":
            self._arriving_adapter.finish(self._engine_thread.llm)
        else:
            self._engine_thread.call_workers(_FINISH[self._route])
            self._base_replaced = True
            if self._adapter is not None:
                self._adapter.request = None
        self._engine_thread.llm.reset_prefix_cache()
        self.version = version


def _output(request_id: str, version: PolicyVersion, output: RequestOutput) -> EngineOutput:
    completion = output.outputs[0]
    token_ids = np.asarray(completion.token_ids, dtype=np.int32)
    # With `logprobs=0` each position has one entry, that of the sampled token.
    logprobs = np.asarray(completion.logprobs.logprobs, dtype=np.float32)
    versions = np.full(len(token_ids), version, dtype=np.int32)
    return EngineOutput(request_id, token_ids, logprobs, versions, completion.finish_reason)


def _prompt_logprobs(token_ids: np.ndarray, output: RequestOutput) -> np.ndarray:
    entries = zip(output.prompt_logprobs[1:], token_ids[1:].tolist(), strict=True)
    return np.asarray([entry[token].logprob for entry, token in entries], dtype=np.float32)
