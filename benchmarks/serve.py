"""Requests per second and latencies of three servers of the same model: vLLM's own, stock `ray.serve.llm`, and this project's.

Each server runs alone and is warmed up. The same client asks for completions of exactly `--tokens` tokens for `--seconds`, over
`--concurrent` connections that send the next request when the last is answered. The project's endpoint is a user's: keys, limits,
versions, one gateway. The client runs on the same machine for all servers. Ratios are of requests per second.
Usage: `python benchmarks/serve.py [--size small|medium] [--concurrent 32] [--seconds 30] [--quick]`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
from common import build_model, make_prompts, report

KEY = "a-key-of-the-benchmark"
PORT = 8765
START_TIMEOUT_S = 300.0
CONTEXT = 512
SERVERS = ("vllm", "stock", "ours")
NAMES = {"vllm": "vLLM's own server", "stock": "stock ray.serve.llm", "ours": "rlhf-ray serve"}


def command(server: str, model: Path, threads: int) -> tuple[list[str], dict[str, str]]:
    """The command of a server, and its additional environment variables."""
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "RAY_SERVE_LOG_TO_STDERR": "0",
    }
    if server == "vllm":
        arguments = [
            "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "policy",
            "--port", str(PORT), "--max-model-len", str(CONTEXT), "--dtype", "float32", "--enforce-eager",
            "--no-enable-chunked-prefill", "--max-num-batched-tokens", "8192", "--max-num-seqs", "64",
            "--kv-cache-memory-bytes", str(1 << 30),
            "--disable-log-stats", "--no-enable-log-requests", "--generation-config", "vllm",
        ]  # fmt: skip
        return [sys.executable, *arguments], environment
    if server == "stock":
        return [sys.executable, __file__, "--stock", str(model), str(threads)], environment
    arguments = [
        "-m", "rlhf_ray", "serve", str(model), f"port={PORT}", "policy.dtype=float32", f"policy.max_sequence_tokens={CONTEXT}",
        f"policy.workers.threads={threads}", "limits.requests_per_minute=1000000",
    ]  # fmt: skip
    return [sys.executable, *arguments], environment | {"RLHF_RAY_API_KEYS": f"benchmark:{KEY}"}


def serve_stock(model: str, threads: str) -> None:
    """Serve with `ray.serve.llm` as in its documentation, with the engine settings of the other servers."""
    import ray
    from ray import serve
    from ray.serve.llm import LLMConfig, build_openai_app

    from rlhf_ray.runtime.cluster import local_runtime_env

    ray.init(address="local", include_dashboard=False, log_to_driver=False, runtime_env=local_runtime_env())
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    config = LLMConfig(
        model_loading_config={"model_id": "policy", "model_source": model},
        engine_kwargs={
            "max_model_len": CONTEXT, "dtype": "float32", "enforce_eager": True, "enable_chunked_prefill": False,
            "max_num_batched_tokens": 8192, "max_num_seqs": 64, "kv_cache_memory_bytes": 1 << 30, "disable_log_stats": True,
            "generation_config": "vllm",
        },
        placement_group_config={"bundles": [{"CPU": 0.5}]},
        deployment_config={"max_ongoing_requests": 256, "ray_actor_options": {"num_cpus": 0}},
        runtime_env={
            "env_vars": {"OMP_NUM_THREADS": threads, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_WAIT_POLICY": "passive"}
        },
        log_engine_metrics=False,
    )  # fmt: skip
    serve.run(build_openai_app({"llm_configs": [config]}), blocking=True)


@contextmanager
def running(server: str, model: Path, threads: int, log: Path) -> Iterator[None]:
    """A server that is ready. It is stopped on exit."""
    arguments, environment = command(server, model, threads)
    with log.open("w") as output:
        process = subprocess.Popen(
            arguments, env=os.environ | environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not asyncio.run(answers()):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{NAMES[server]} did not start: {log.read_text()[-3000:]}")
            time.sleep(0.5)
        yield
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


async def answers() -> bool:
    """Whether the server answers a completion."""
    try:
        async with client() as asking:
            return (await ask(asking, "a" * 16, 1)).is_success
    except httpx.HTTPError:
        return False


def client() -> httpx.AsyncClient:
    """A client whose connections stay open."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    headers = {"authorization": f"Bearer {KEY}"}
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{PORT}", headers=headers, timeout=120, limits=limits)


async def ask(asking: httpx.AsyncClient, prompt: str, tokens: int) -> httpx.Response:
    """Ask for one completion of exactly `tokens` tokens."""
    body = {"model": "policy", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 1.0}
    return await asking.post("/v1/completions", json=body)


async def load(concurrent: int, seconds: float, tokens: int) -> np.ndarray:
    """float64: the seconds of each request that ended within the time."""
    prompts, took = make_prompts(256), []
    end = time.perf_counter() + seconds

    async def keep_asking(asking: httpx.AsyncClient, number: int) -> None:
        while (began := time.perf_counter()) < end:
            number += concurrent
            answer = await ask(asking, prompts[number % len(prompts)], tokens)
            answer.raise_for_status()
            if time.perf_counter() <= end:
                took.append(time.perf_counter() - began)

    async with client() as asking:
        await asyncio.gather(*(keep_asking(asking, number) for number in range(concurrent)))
    return np.asarray(took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("small", "medium"), default="medium")
    parser.add_argument("--concurrent", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="only show that it works")
    parser.add_argument("--stock", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stock:
        serve_stock(*arguments.stock)
        return
    seconds = 3.0 if arguments.quick else arguments.seconds
    rows, measured = [], {}
    with tempfile.TemporaryDirectory() as place:
        model = Path(place) / "model"
        parameters = build_model(model, arguments.size)
        for server in SERVERS:
            with running(server, model, arguments.threads, Path(place) / f"{server}.log"):
                asyncio.run(load(arguments.concurrent, min(5.0, seconds), arguments.tokens))
                took = asyncio.run(load(arguments.concurrent, seconds, arguments.tokens))
            rate, (p50, p99) = len(took) / seconds, np.percentile(took, (50, 99))
            measured[server] = {"requests_per_s": rate, "p50_s": p50, "p99_s": p99, "requests": len(took)}
        for server, figures in measured.items():
            against = [figures["requests_per_s"] / measured[other]["requests_per_s"] for other in ("vllm", "stock")]
            rows.append((NAMES[server], figures["requests_per_s"], figures["p50_s"], figures["p99_s"], *against))
    title = f"{parameters / 1e6:.1f} M parameters, {arguments.concurrent} concurrent, {arguments.tokens} tokens each"
    report(
        title, ("server", "requests/s", "p50, s", "p99, s", "of vLLM's", "of stock"), rows, vars(arguments) | measured
    )


if __name__ == "__main__":
    main()
