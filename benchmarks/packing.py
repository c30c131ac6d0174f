"""Tokens per second of a learner's optimizer step on dialogues of real lengths: packed, and padded in two ways.

The service's learner (one rank) takes the same step over the same sequences with three plans: `usual` has micro-batches of
`--usual-batch` sequences in the order of the data, each padded to its longest, as TRL and most trainers do; `sorted` is this
project's micro-batches of similar lengths (`packing: false`); `packed` is `packing: true`. Only real tokens are counted. The
lengths are those of hh-rlhf (harmless) dialogues: from `--data`, a JSON-lines file of pairs, with a tokenizer of 4,096 entries
trained on it, or drawn from a log-normal distribution fitted to them. Sides take turns; ratios are medians over turns.
Usage: `python benchmarks/packing.py [--data pairs.jsonl] [--sizes small medium] [--quick] …`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
from common import VOCABULARY, build_model, load_average, report

from rlhf_ray.batch import Batch, pack_sequences
from rlhf_ray.config.algorithm import AlgorithmConfig, KLConfig
from rlhf_ray.config.learner import LearnerConfig
from rlhf_ray.config.section import Workers
from rlhf_ray.learner.actor import LearnerSpec
from rlhf_ray.learner.group import LearnerGroup
from rlhf_ray.micro_batches import plan_micro_batches
from rlhf_ray.models.tiny import train_tokenizer

LONGEST = 512
"""Most tokens of a dialogue; longer ones are cut, as is usual."""
LOG_MEAN, LOG_STD = 4.876, 0.811
"""Mean and standard deviation of log(tokens) over the 3,600 dialogues of 1,800 hh-rlhf pairs."""
SIDES = ("usual", "sorted", "packed")
WARM_UP = 1
TURNS = {"small": 9, "medium": 4}


def dialogue_lengths(data: Path | None, count: int) -> np.ndarray:
    """int64 [count]: tokens of dialogues in the order of the data, chosen and rejected alternating."""
    if data is None:
        lengths = np.random.default_rng(0).lognormal(LOG_MEAN, LOG_STD, count)
    else:
        with data.open() as file:
            pairs = [json.loads(line) for line in file]
        texts = [pair[side] for pair in pairs for side in ("chosen", "rejected")]
        encoded = train_tokenizer(texts, 4096, 1 << 16)(texts[:count])["input_ids"]
        lengths = np.asarray([len(ids) for ids in encoded])
    return np.clip(lengths, 4, LONGEST).astype(np.int64)


def make_batch(lengths: np.ndarray) -> Batch:
    """Random tokens; the second half of each sequence are the targets."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(2, len(VOCABULARY), length) for length in lengths]
    batch = pack_sequences(ids, [np.arange(n) >= n // 2 for n in lengths])
    targets = int(batch.target_mask.sum())
    return batch.with_columns(
        weights=np.full(targets, 1 / targets, dtype=np.float32),
        advantages=rng.normal(size=targets).astype(np.float32),
    )


def plans(lengths: np.ndarray, budget: int, usual_batch: int) -> dict[str, list[np.ndarray]]:
    """The micro-batches of each side."""
    order = np.arange(len(lengths))
    return {
        "usual": [order[start : start + usual_batch] for start in range(0, len(order), usual_batch)],
        "sorted": list(plan_micro_batches(lengths, 1, budget)[0]),
        "packed": list(plan_micro_batches(lengths, 1, budget, packing=True)[0]),
    }


def computed_tokens(lengths: np.ndarray, side: str, micro_batches: list[np.ndarray]) -> int:
    """Tokens that the model computes, including padding."""
    if side == "packed":
        return int(lengths.sum())
    return sum(len(indices) * int(lengths[indices].max()) for indices in micro_batches)


async def start_learner(model: str, packing: bool, arguments: argparse.Namespace) -> LearnerGroup:
    config = LearnerConfig(
        workers=Workers(cpus=0, threads=arguments.threads),
        packing=packing,
        precision=arguments.precision,
    )
    algorithm = AlgorithmConfig(advantage="grpo", kl=KLConfig(placement="none"))
    environment = {"OMP_NUM_THREADS": str(arguments.threads), "OMP_WAIT_POLICY": "passive"}
    options = {"num_cpus": 0, "runtime_env": {"env_vars": environment}}
    return await LearnerGroup.start(LearnerSpec("policy", model, config, algorithm), lambda index: options)


async def measure(model: str, size: str, lengths: np.ndarray, arguments: argparse.Namespace) -> dict[str, Any]:
    """The seconds of each side's steps, speeds and ratios."""
    batch, micro_batches = make_batch(lengths), plans(lengths, arguments.micro_batch_tokens, arguments.usual_batch)
    groups = {packing: await start_learner(model, packing, arguments) for packing in (False, True)}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    losses: dict[str, float] = {}
    for _ in range(WARM_UP + (arguments.turns or TURNS[size])):
        for side in SIDES:
            (rank,) = groups[side == "packed"].ranks
            began = time.perf_counter()
            # With a learning rate of zero, all turns of all sides are the same step, so their losses can be compared.
            result = await rank.update.remote(batch, micro_batches[side], 0.0, 0.0)
            seconds[side].append(time.perf_counter() - began)
            losses[side] = result.loss
    for group in groups.values():
        group.close()
    spread = max(losses.values()) - min(losses.values())
    if spread > 1e-4 and arguments.precision == "fp32":
        raise RuntimeError(f"the sides do not compute the same: losses {losses}")
    counted = {side: np.asarray(times[WARM_UP:]) for side, times in seconds.items()}
    tokens = int(lengths.sum())
    return {
        "size": size,
        "tokens": tokens,
        **{f"{side}_tokens_per_s": tokens / float(np.median(times)) for side, times in counted.items()},
        **{f"ratio_to_{side}": float(np.median(counted[side] / counted["packed"])) for side in SIDES[:2]},
        "real_share": {s: tokens / computed_tokens(lengths, s, plan) for s, plan in micro_batches.items()},
        "loss_spread": spread,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="hh-rlhf pairs; without it, lengths are drawn from a fitted distribution"
    )
    parser.add_argument("--sizes", nargs="+", choices=TURNS, default=list(TURNS), help="0.8 and 28 million parameters")
    parser.add_argument("--samples", type=int, default=64, help="sequences of one step")
    parser.add_argument("--usual-batch", type=int, default=8, help="sequences of a micro-batch with the usual padding")
    parser.add_argument("--turns", type=int, help="counted steps of each side")
    parser.add_argument("--threads", type=int, default=2, help="OpenMP threads of the learner")
    parser.add_argument("--precision", choices=("fp32", "autocast"), default="fp32")
    parser.add_argument("--micro-batch-tokens", type=int, default=LearnerConfig().micro_batch_tokens)
    parser.add_argument("--quick", action="store_true", help="two turns of the small model, to see whether it works")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.sizes, arguments.turns = ["small"], 2
    load = load_average()
    lengths = dialogue_lengths(arguments.data, arguments.samples)
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    results = []
    with tempfile.TemporaryDirectory() as name:
        for size in arguments.sizes:
            folder = Path(name) / size
            parameters = build_model(folder, size)
            results.append({"parameters": parameters, **asyncio.run(measure(str(folder), size, lengths, arguments))})
    ray.shutdown()
    figures = ("tokens", *(f"{side}_tokens_per_s" for side in SIDES), *(f"ratio_to_{side}" for side in SIDES[:2]))
    rows = [(f"{result['parameters'] / 1e6:.3g} M", *(result[figure] for figure in figures)) for result in results]
    columns = ("parameters", "tokens", "usual tok/s", "sorted tok/s", "packed tok/s", "packed/usual", "packed/sorted")
    settings = {
        name: getattr(arguments, name)
        for name in ("samples", "usual_batch", "threads", "precision", "micro_batch_tokens")
    }
    settings["lengths"] = "fitted" if arguments.data is None else arguments.data.name
    record = {"benchmark": "packing", **settings, "load_before": load, "results": results}
    report("One optimizer step on hh-rlhf lengths, median, real tokens", columns, rows, record)


if __name__ == "__main__":
    main()
