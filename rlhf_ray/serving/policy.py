"""The engines of one version as a Serve application: vLLM through `ray.serve.llm`.

Private Ray API: the base classes of the engine and of the download callback. `ray.serve.llm` accepts both and exports
neither.
"""

from __future__ import annotations

import logging
from typing import Any

from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from ray.serve import Application
from ray.serve.llm import LLMConfig, build_llm_deployment

from rlhf_ray.config.serving import ServingConfig
from rlhf_ray.models.loading import context_of
from rlhf_ray.runs.storage.folders import fetch_copy
from rlhf_ray.runs.storage.location import copy_of, is_reference
from rlhf_ray.serving.versions import Version


class OneProcessEngine(VLLMEngine):
    """Runs vLLM's scheduler and model in one process, like vLLM's own server, if the model is not split over workers.

    On CPUs `ray.serve.llm` always asks vLLM for separate worker processes, so each generation step crosses a process boundary.
    On GPUs nothing changes: there Ray manages the workers.
    """

    def _start_async_llm_engine(self, arguments: Any, config: Any, placement_group: Any) -> Any:
        parallel = config.parallel_config
        if parallel.distributed_executor_backend == "mp" and parallel.world_size == 1:
            parallel.distributed_executor_backend = "uni"
        return super()._start_async_llm_engine(arguments, config, placement_group)


class DownloadFromStore(CallbackBase):
    """Downloads `model`, a folder of a run on a store, to each node of an engine before the engine loads it."""

    async def on_before_node_init(self) -> None:
        """Set the local path, which is the same on every node."""
        self.llm_config.get_engine_config().hf_model_id = str(copy_of(self.kwargs["model"]))

    def on_before_download_model_files_distributed(self) -> None:
        """Download the folder. Ray calls this on each node."""
        fetch_copy(self.kwargs["model"])


def build_policy(config: ServingConfig, version: Version) -> Application:
    """The application with this version's engines. It has no route of its own."""
    # Its INFO messages contain the values of `workers.env`, which may be secret.
    logging.getLogger("ray.serve.ray.llm._internal.serve.core.server.builder").setLevel(logging.WARNING)
    engine, replicas = config.policy, config.replicas
    worker = engine.workers
    bundle = {"CPU": worker.cpus, **({"GPU": worker.gpus} if worker.gpus else {}), **worker.resources}
    context = engine.max_sequence_tokens or context_of(fetch_copy(version.folder, weights=False))
    stored = is_reference(version.folder)
    return build_llm_deployment(
        LLMConfig(
            model_loading_config={"model_id": version.name, "model_source": None if stored else version.folder},
            callback_config={"callback_class": DownloadFromStore, "callback_kwargs": {"model": version.folder}}
            if stored
            else {},
            engine_kwargs=engine_arguments(config, context),
            placement_group_config={"bundles": [bundle] * engine.tensor_parallel},
            runtime_env={"env_vars": environment(config)},
            log_engine_metrics=False,
            deployment_config={
                "autoscaling_config": {
                    "min_replicas": replicas.minimum,
                    "max_replicas": replicas.maximum,
                    "target_ongoing_requests": replicas.target_ongoing_requests,
                },
                # The engine has its own queue and batches the requests in it.
                "max_ongoing_requests": max(4 * engine.max_concurrent, 100),
                "graceful_shutdown_timeout_s": config.limits.timeout_s,
                "ray_actor_options": {"num_cpus": 0},
            },
        ),
        bind_kwargs={"engine_cls": OneProcessEngine},
    )


def engine_arguments(config: ServingConfig, context: int) -> dict[str, Any]:
    """vLLM's arguments for one replica. `config.policy.engine` overrides the others."""
    engine = config.policy
    arguments: dict[str, Any] = {
        "max_model_len": context,
        "max_num_seqs": engine.max_concurrent,
        "dtype": engine.dtype,
        "tensor_parallel_size": engine.tensor_parallel,
        "quantization": engine.quantization,
        "enforce_eager": engine.enforce_eager,
        "trust_remote_code": False,
        "disable_log_stats": True,
        "generation_config": "vllm",
        # The default of a request. vLLM lowers it if the model's context is shorter.
        "override_generation_config": {"max_new_tokens": config.limits.max_tokens},
    }
    if engine.workers.gpus:
        arguments["gpu_memory_utilization"] = engine.gpu_memory_utilization
    else:
        arguments["kv_cache_memory_bytes"] = int(engine.kv_cache_gb * (1 << 30))
        # With a prompt split over several steps, vLLM rewinds the request's random generator, which is impossible on a CPU.
        arguments |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(context, 8192)}
    return arguments | engine.engine


def environment(config: ServingConfig) -> dict[str, str]:
    """Environment variables of a replica's processes."""
    worker = config.policy.workers
    on_cpu = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return {**({} if worker.gpus else on_cpu), **worker.process_environment}
