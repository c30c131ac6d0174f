"""Tokens per second of `LearnerGroup.update` against a bare PyTorch loop with the same mathematics.

Each side is one process with the same environment, model, sequences, micro-batches and fused AdamW; the sides take turns. The
service's side is timed by its caller, so it includes the cost of the call and its data, DeepSpeed and the diagnostics with the
entropy. The bare loop already has its data and times itself. In fp32 on a CPU the service multiplies matrices with oneDNN
(`rlhf_ray.models.cpu_linear`) and PyTorch with MKL; a second bare loop with the service's linear layers separates that gain.
Usage: `python benchmarks/learner.py [--sizes small medium] [--precision fp32|autocast] [--quick] …`.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from common import PROMPT_TOKENS, VOCABULARY, build_model, load_average, report
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from rlhf_ray.batch import Batch, pack_sequences
from rlhf_ray.config.algorithm import AlgorithmConfig, KLConfig
from rlhf_ray.config.learner import LearnerConfig, OptimizerConfig
from rlhf_ray.config.section import Workers
from rlhf_ray.learner.actor import LearnerSpec
from rlhf_ray.learner.group import LearnerGroup
from rlhf_ray.micro_batches import plan_micro_batches
from rlhf_ray.models.cpu_linear import use_onednn

LEARNING_RATE, CLIP, BETA, MAX_NORM = 1e-6, 0.2, 0.05, 1.0
WARM_UP = 2
SIDES = ("learner", "bare", "bare_onednn")
TURNS = {"small": 15, "medium": 5}


@dataclass(frozen=True)
class Sequence:
    """A prompt with a response of T tokens."""

    token_ids: torch.Tensor
    """int64 [P + T]."""
    old: torch.Tensor
    reference: torch.Tensor
    advantages: torch.Tensor
    """float32 [T], all three."""


def make_sequences(count: int) -> list[Sequence]:
    """Responses that stop geometrically: 64 tokens on average, 256 at most."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.geometric(1 / 64, count), 256)
    level = -float(np.log(len(VOCABULARY)))

    def column(size: int, mean: float, spread: float) -> torch.Tensor:
        return torch.from_numpy(rng.normal(mean, spread, size)).float()

    return [
        Sequence(
            torch.from_numpy(rng.integers(2, len(VOCABULARY), PROMPT_TOKENS + length)),
            *(column(length, level, 0.05), column(length, level, 0.05), column(length, 0.0, 1.0)),
        )
        for length in lengths
    ]


def as_batch(sequences: list[Sequence]) -> Batch:
    """The same sequences as the service's batch."""
    ids = [s.token_ids.numpy() for s in sequences]
    batch = pack_sequences(ids, [np.arange(len(row)) >= PROMPT_TOKENS for row in ids])
    targets = int(batch.target_mask.sum())
    return batch.with_columns(
        weights=np.full(targets, 1 / targets, dtype=np.float32),
        old_logprobs=torch.cat([s.old for s in sequences]).numpy(),
        reference_logprobs=torch.cat([s.reference for s in sequences]).numpy(),
        advantages=torch.cat([s.advantages for s in sequences]).numpy(),
    )


class BareLoop:
    """A training step as in a notebook, written with care for speed."""

    def __init__(
        self, model: str, micro_batches: list[list[Sequence]], autocast: bool, threads: int, onednn: bool
    ) -> None:
        torch.set_num_threads(threads)
        self.model = AutoModelForCausalLM.from_pretrained(model).train()
        if onednn:
            use_onednn(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), LEARNING_RATE, weight_decay=0.0, fused=True)
        self.autocast = autocast
        self.micro_batches = micro_batches
        self.targets = sum(len(s.old) for micro_batch in micro_batches for s in micro_batch)

    def step(self) -> float:
        """Seconds of one optimizer step."""
        began = time.perf_counter()
        for micro_batch in self.micro_batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                loss = self._loss(micro_batch)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - began

    def _loss(self, sequences: list[Sequence]) -> torch.Tensor:
        ids = pad_sequence([s.token_ids for s in sequences], batch_first=True)
        rows = torch.cat([torch.full((len(s.old),), row) for row, s in enumerate(sequences)])
        columns = torch.cat([torch.arange(PROMPT_TOKENS, len(s.token_ids)) for s in sequences])
        states = self.model.model(ids, use_cache=False).last_hidden_state[rows, columns - 1]
        logprobs = self.model.lm_head(states).float().log_softmax(-1)
        logprobs = logprobs.gather(1, ids[rows, columns].unsqueeze(1)).squeeze(1)
        old, reference, advantages = (
            torch.cat([getattr(s, name) for s in sequences]) for name in ("old", "reference", "advantages")
        )
        ratio = (logprobs - old).exp()
        surrogate = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP))
        log_r = reference - logprobs
        return (surrogate + BETA * (torch.expm1(log_r) - log_r)).sum() / self.targets


async def measure(model: str, size: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of each side, taking turns. Ratios are of neighbouring turns, so that other load affects both sides."""
    sequences = make_sequences(arguments.samples)
    batch = as_batch(sequences)
    config = LearnerConfig(
        workers=Workers(cpus=0, threads=arguments.threads),
        precision=arguments.precision,
        micro_batch_tokens=arguments.micro_batch_tokens,
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, max_grad_norm=MAX_NORM),
    )
    algorithm = AlgorithmConfig(advantage="grpo", kl=KLConfig(placement="loss", estimator="k3", coefficient=BETA))
    environment = {"OMP_NUM_THREADS": str(arguments.threads), "OMP_WAIT_POLICY": "passive"}
    options = {"num_cpus": 0, "runtime_env": {"env_vars": environment}}
    group = await LearnerGroup.start(LearnerSpec("policy", model, config, algorithm), lambda index: options)
    autocast = arguments.precision == "autocast"
    (plan,) = plan_micro_batches(batch.lengths, 1, arguments.micro_batch_tokens)
    micro_batches = [[sequences[index] for index in indices] for indices in plan]
    loops = {
        side: ray.remote(BareLoop).options(**options).remote(model, micro_batches, autocast, arguments.threads, onednn)
        for side, onednn in zip(SIDES[1:], (False, True), strict=True)
    }
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(arguments.turns or TURNS[size]):
        began = time.perf_counter()
        await group.update(batch, LEARNING_RATE, BETA)
        seconds["learner"].append(time.perf_counter() - began)
        for side, loop in loops.items():
            seconds[side].append(await loop.step.remote())
    group.close()
    for loop in loops.values():
        ray.kill(loop)
    counted = {side: np.asarray(times[WARM_UP:]) for side, times in seconds.items()}
    tokens = int(batch.lengths.sum())
    speeds = {f"{side}_tokens_per_s": tokens / float(np.median(times)) for side, times in counted.items()}
    ratios = {f"ratio_to_{side}": float(np.median(counted[side] / counted["learner"])) for side in loops}
    return {"size": size, "tokens": tokens, **speeds, **ratios, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=TURNS, default=list(TURNS), help="0.8 and 28 million parameters")
    parser.add_argument("--samples", type=int, default=64, help="sequences of one step")
    parser.add_argument("--turns", type=int, help="steps of each side; the first two are not counted")
    parser.add_argument("--threads", type=int, default=2, help="OpenMP threads of each side")
    parser.add_argument("--precision", choices=("fp32", "autocast"), default="fp32")
    parser.add_argument("--micro-batch-tokens", type=int, default=LearnerConfig().micro_batch_tokens)
    parser.add_argument("--quick", action="store_true", help="four turns of the small model, to see whether it works")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.sizes, arguments.turns = ["small"], 4
    load = load_average()
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    results = []
    with tempfile.TemporaryDirectory() as name:
        for size in arguments.sizes:
            folder = Path(name) / size
            parameters = build_model(folder, size)
            results.append({"parameters": parameters, **asyncio.run(measure(str(folder), size, arguments))})
    ray.shutdown()
    figures = ("tokens", *(f"{side}_tokens_per_s" for side in SIDES), *(f"ratio_to_{side}" for side in SIDES[1:]))
    rows = [(f"{result['parameters'] / 1e6:.3g} M", *(result[figure] for figure in figures)) for result in results]
    columns = ("parameters", "tokens", "learner tok/s", "bare tok/s", "bare, oneDNN", "ratio", "ratio, oneDNN")
    settings = {name: getattr(arguments, name) for name in ("samples", "threads", "precision", "micro_batch_tokens")}
    record = {"benchmark": "learner", **settings, "load_before": load, "results": results}
    report("One optimizer step of the learner, median", columns, rows, record)


if __name__ == "__main__":
    main()
