"""Tokens per second of a reward worker that receives rollouts in batches, against the same worker with one at a time.

Both sides are the service's `RewardWorker`, in this process, with the same model and rollouts; they take turns, and a score must
not depend on the side. The service sends `ppo.reward.batch_tokens` at a time; the worker cuts them into micro-batches.
Usage: `python benchmarks/scoring.py [--sizes small medium] [--quick] …`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import PROMPT_TOKENS, VOCABULARY, build_model, load_average, report
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_ray.config.reward import RewardConfig
from rlhf_ray.config.section import Workers
from rlhf_ray.rewards.workers import RewardWorker
from rlhf_ray.types import Prompt, Rollout, RolloutRequest

TURNS = {"small": 7, "medium": 4}
WARM_UP = 1
MEAN_TOKENS, MOST_TOKENS = 64, 256


def build_reward_model(folder: Path, size: str) -> int:
    """Write a sequence-classification folder with a random head. Returns the number of parameters."""
    base = folder.with_name(f"{folder.name}-base")
    build_model(base, size)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return model.num_parameters()


def make_rollouts(count: int) -> list[Rollout]:
    """Responses that stop geometrically: 64 tokens on average, 256 at most."""
    rng = np.random.default_rng(0)
    rollouts = []
    for number, length in enumerate(np.minimum(rng.geometric(1 / MEAN_TOKENS, count), MOST_TOKENS)):
        asked, answered = (rng.integers(2, len(VOCABULARY), n).astype(np.int32) for n in (PROMPT_TOKENS, length))
        prompt = Prompt(str(number), asked, ({"role": "user", "content": "?"},))
        zeros = np.zeros(length)
        rollouts.append(
            Rollout(
                RolloutRequest(prompt, 0, number), answered, zeros.astype(np.float32), zeros.astype(np.int32), "stop"
            )
        )
    return rollouts


def timed(score: Callable[[], list[float]]) -> tuple[float, np.ndarray]:
    """Seconds, and the scores."""
    began = time.perf_counter()
    scores = score()
    return time.perf_counter() - began, np.asarray(scores)


def measure(model: str, size: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of both sides, taking turns. The ratio is of neighbouring turns.

    Raises:
        RuntimeError: the sides' scores differ by more than 1e-4, or all scores are equal, which would hide a difference.
    """
    rollouts = make_rollouts(arguments.samples)
    config = RewardConfig(workers=Workers(cpus=0, threads=arguments.threads))
    worker = RewardWorker(config, [model], model)
    sides = {
        "batched": lambda: [score.total for score in worker.score(rollouts)],
        "one_by_one": lambda: [worker.score([rollout])[0].total for rollout in rollouts],
    }
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(arguments.turns or TURNS[size]):
        scores = {}
        for side, score in sides.items():
            taken, scores[side] = timed(score)
            seconds[side].append(taken)
        if not scores["batched"].std():
            raise RuntimeError("all scores are equal, so the sides cannot be compared")
        if (difference := float(np.abs(scores["batched"] - scores["one_by_one"]).max())) > 1e-4:
            raise RuntimeError(f"a score differs by {difference:.2g} between the sides; both must be equal")
    counted = {side: np.asarray(times[WARM_UP:]) for side, times in seconds.items()}
    tokens = sum(len(r.prompt.token_ids) + len(r) for r in rollouts)
    speeds = {f"{side}_tokens_per_s": tokens / float(np.median(times)) for side, times in counted.items()}
    ratio = float(np.median(counted["one_by_one"] / counted["batched"]))
    return {"size": size, "tokens": tokens, **speeds, "ratio": ratio, "difference": difference, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=TURNS, default=list(TURNS), help="0.8 and 28 million parameters")
    parser.add_argument("--samples", type=int, default=128, help="rollouts")
    parser.add_argument("--turns", type=int, help="measurements of each side; the first is not counted")
    parser.add_argument("--threads", type=int, default=2, help="OpenMP threads of the worker")
    parser.add_argument("--quick", action="store_true", help="two turns of the small model, to see whether it works")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.sizes, arguments.turns = ["small"], 2
    load, results = load_average(), []
    with tempfile.TemporaryDirectory() as name:
        for size in arguments.sizes:
            folder = Path(name) / size
            parameters = build_reward_model(folder, size)
            results.append({"parameters": parameters, **measure(str(folder), size, arguments)})
    figures = ("tokens", "batched_tokens_per_s", "one_by_one_tokens_per_s", "ratio")
    rows = [(f"{result['parameters'] / 1e6:.3g} M", *(result[figure] for figure in figures)) for result in results]
    settings = {name: getattr(arguments, name) for name in ("samples", "threads")}
    record = {"benchmark": "scoring", **settings, "load_before": load, "results": results}
    report(
        "Scoring by a reward model, median",
        ("parameters", "tokens", "batched tok/s", "one by one", "ratio"),
        rows,
        record,
    )


if __name__ == "__main__":
    main()
