"""Tokens per second through the rollout pool with one worker, against the same vLLM called directly.

Both sides are Ray actors with the same environment, engine arguments, prompts, seeds and threads. They take turns, and
each pair of turns gives one ratio. Usage: `python benchmarks/rollout.py [--model small|medium] [--workload
ragged|fixed] …`. Prints a table and one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import ray
import torch
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from rlhf_ray.config.rollout import RolloutConfig, SamplingConfig
from rlhf_ray.config.section import Workers
from rlhf_ray.rollout.pool import RolloutPool
from rlhf_ray.rollout.requests import EngineRequest
from rlhf_ray.rollout.worker import worker_environment
from rlhf_ray.types import Prompt, RolloutRequest, rollout_seed

VOCABULARY, PROMPT_TOKENS, CONTEXT = 64, 16, 320
MODELS = {
    "small": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4},
    "medium": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8},
}
WORKLOADS = {
    "ragged": SamplingConfig(max_new_tokens=256),
    "fixed": SamplingConfig(max_new_tokens=64, ignore_eos=True),
}


@dataclass(frozen=True)
class Pair:
    """Tokens per second of two neighbouring turns."""

    pool: float
    direct: float
    tokens: int

    @property
    def ratio(self) -> float:
        return self.pool / self.direct


class DirectEngine:
    """vLLM's own loop, as in its documentation."""

    def __init__(self, model: str, config: RolloutConfig) -> None:
        from vllm.v1.engine.llm_engine import LLMEngine

        from rlhf_ray.rollout.vllm_arguments import end_tokens, engine_arguments

        self.engine = LLMEngine.from_engine_args(engine_arguments(model, config, CONTEXT))
        self.ends = end_tokens(model)

    def run(self, requests: list[EngineRequest], sampling: SamplingConfig) -> tuple[int, float]:
        """The number of generated tokens, and the seconds."""
        from rlhf_ray.rollout.vllm_arguments import sampling_parameters

        began = time.perf_counter()
        for request in requests:
            parameters = sampling_parameters(sampling, request.seed, self.ends)
            self.engine.add_request(request.id, {"prompt_token_ids": request.token_ids.tolist()}, parameters)
        tokens = 0
        while self.engine.has_unfinished_requests():
            tokens += sum(len(output.outputs[0].token_ids) for output in self.engine.step())
        return tokens, time.perf_counter() - began


def build_model(folder: Path, size: str) -> int:
    """Write a random Qwen2 with a small vocabulary, so that responses end by chance. Returns the number of parameters."""
    torch.manual_seed(0)
    heads = MODELS[size]["num_attention_heads"]
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        num_key_value_heads=heads // 2,
        max_position_embeddings=512,
        eos_token_id=1,
        **MODELS[size],
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=[1])
    model.save_pretrained(folder)
    return model.num_parameters()


def make_requests(samples: int, turn: int) -> list[RolloutRequest]:
    """Requests with different prompts for each turn."""
    generator = np.random.default_rng(turn)
    prompts = [
        Prompt(f"{turn}-{i}", generator.integers(3, VOCABULARY, PROMPT_TOKENS, dtype=np.int32), ())
        for i in range(samples)
    ]
    return [RolloutRequest(prompt, 0, rollout_seed("benchmark", prompt.id, 0)) for prompt in prompts]


async def measure(model: str, config: RolloutConfig, arguments: argparse.Namespace) -> list[Pair]:
    """Pairs of turns; the first pair warms both sides up and is not counted."""
    pool = RolloutPool(config)
    await pool.start(model, CONTEXT, 0, lambda index: {"num_cpus": 0})
    environment = {"env_vars": worker_environment(config)}
    direct = ray.remote(DirectEngine).options(num_cpus=0, runtime_env=environment).remote(model, config)
    pairs = []
    for turn in range(arguments.pairs + 1):
        requests = make_requests(arguments.samples, turn)

        async def through_pool(requests: list[RolloutRequest] = requests) -> tuple[int, float]:
            began = time.perf_counter()
            tokens = sum([len(rollout) async for rollout in pool.generate(requests)])
            return tokens, time.perf_counter() - began

        async def directly(requests: list[RolloutRequest] = requests) -> tuple[int, float]:
            return await direct.run.remote([EngineRequest.of(request) for request in requests], config.sampling)

        # The sides alternate in going first, so that neither always finds a warmer machine.
        sides = [through_pool, directly] if turn % 2 else [directly, through_pool]
        results = {side: await side() for side in sides}
        (pool_tokens, pool_s), (direct_tokens, direct_s) = results[through_pool], results[directly]
        if pool_tokens != direct_tokens:
            raise RuntimeError(f"the pool generated {pool_tokens} tokens and vLLM {direct_tokens} from the same seeds")
        pairs.append(Pair(pool_tokens / pool_s, direct_tokens / direct_s, pool_tokens))
    await pool.close()
    return pairs[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="small", help="0.8 or 25 million parameters")
    parser.add_argument(
        "--workload", choices=WORKLOADS, default="ragged", help="until the end token, or 64 tokens each"
    )
    parser.add_argument("--samples", type=int, default=64, help="sequences per turn")
    parser.add_argument("--pairs", type=int, default=9, help="pairs of turns")
    parser.add_argument("--threads", type=int, default=2, help="OpenMP threads of each side")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    config = RolloutConfig(
        workers=Workers(cpus=0, threads=arguments.threads),
        dtype=arguments.dtype,
        sampling=WORKLOADS[arguments.workload],
    )
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with tempfile.TemporaryDirectory() as folder:
        parameters = build_model(Path(folder), arguments.model)
        pairs = asyncio.run(measure(folder, config, arguments))
    ray.shutdown()
    print(f"{'pair':>4} {'tokens':>7} {'pool tok/s':>11} {'vLLM tok/s':>11} {'ratio':>6}")
    for index, pair in enumerate(pairs):
        print(f"{index:>4} {pair.tokens:>7} {pair.pool:>11.0f} {pair.direct:>11.0f} {pair.ratio:>6.3f}")
    summary = {
        "benchmark": "rollout",
        **vars(arguments),
        "parameters": parameters,
        "pool_tokens_per_s": statistics.median(pair.pool for pair in pairs),
        "direct_tokens_per_s": statistics.median(pair.direct for pair in pairs),
        "ratio": statistics.median(pair.ratio for pair in pairs),
        "measured": [asdict(pair) for pair in pairs],
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
