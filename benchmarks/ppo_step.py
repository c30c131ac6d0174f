"""Samples per second of a whole GRPO step through the service, against TRL's GRPOTrainer on the same model and reward.

A step has 64 samples for 16-token prompts in groups of 4, a reward from a Python function, and one policy update with a KL to the
reference in the loss. This project's side is `rlhf-ray run` with all its actors, metrics and weight updates; TRL's side is its
trainer, which generates with transformers where there is no GPU. Both sides run with the same number of threads, in separate
processes, one after the other, `--rounds` times. The table shows the median step and its phases.

TRL is needed for this benchmark only: `pip install --no-deps --target build/trl -r requirements/benchmark.txt`.
Usage: `python benchmarks/ppo_step.py [--size small|medium] [--workload ragged|fixed] [--bf16] [--quick] …`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from common import build_model, load_average, make_prompts, report

HERE = Path(__file__).resolve().parent
WORKLOADS = {"ragged": (256, False), "fixed": (64, True)}
"""Most new tokens, and whether the end token is ignored: ragged responses have 64 tokens on average."""
LEARNING_RATE, KL, GROUP, SAMPLES, PROMPTS = 1e-6, 0.05, 4, 64, 400
PHASES = ("rollout", "scoring", "preparation", "update", "publication")
STEPS = {"small": 12, "medium": 4}
WARM_UP = 2
"""First steps of each side, which are not counted: kernels choose their code and memory pools grow."""

Step = dict[str, float]
"""Seconds (`step_s`, `<phase>_s`) and generated `tokens` of one step."""


def service_config(arguments: argparse.Namespace, folder: Path) -> dict:
    """The config of the run."""
    max_new_tokens, ignore_eos = WORKLOADS[arguments.workload]
    # The roles of this run take turns, so each can use all cores while it works.
    workers = {"workers": {"threads": arguments.threads, "cpus": 0.1, "busy_wait": True}}
    rollout = {"sampling": {"max_new_tokens": max_new_tokens, "ignore_eos": ignore_eos}}
    if arguments.bf16:
        rollout |= {"dtype": "bfloat16", "weights": {"probe_tolerance": 0.05}}
    return {
        "name": "service",
        "folder": str(folder),
        "stages": ["ppo"],
        "model": {"path": str(folder / "model")},
        "data": {"prompts": {"location": str(folder / "prompts.jsonl")}, "max_prompt_tokens": 16},
        "ppo": {
            "steps": arguments.steps + WARM_UP,
            "batch_size": SAMPLES,
            "samples_per_prompt": GROUP,
            "algorithm": {"advantage": "grpo", "kl": {"placement": "loss", "estimator": "k3", "coefficient": KL}},
            "rollout": workers | rollout,
            "policy": workers
            | {
                "precision": "autocast" if arguments.bf16 else "fp32",
                "optimizer": {"learning_rate": LEARNING_RATE},
            },
            "reference": workers | {"dtype": "bf16" if arguments.bf16 else "fp32"},
            "reward": workers | {"model": None, "functions": [{"name": "lower_case", "function": "common:reward"}]},
            "checkpoint": {"every": 10_000},
        },
    }


def run_service(arguments: argparse.Namespace, folder: Path) -> list[Step]:
    """The steps of `rlhf-ray run`, from its metrics."""
    (folder / "config.yaml").write_text(yaml.safe_dump(service_config(arguments, folder)))
    command = [
        str(Path(sys.executable).parent / "rlhf-ray"),
        "run",
        str(folder / "config.yaml"),
        *arguments.set,
        "--fresh",
    ]
    _call(command, [HERE])
    lines = (folder / "service" / "metrics.jsonl").read_text().splitlines()
    return [_service_step(json.loads(line)) for line in lines]


def _service_step(metrics: dict[str, float]) -> Step:
    times = {f"{phase}_s": metrics[f"time/{phase}_s"] for phase in PHASES}
    return {"step_s": metrics["time/step_s"], "tokens": metrics["response/length_mean"] * SAMPLES, **times}


def run_trl(arguments: argparse.Namespace, folder: Path) -> list[Step]:
    """The steps of `trl_step.py`."""
    max_new_tokens, ignore_eos = WORKLOADS[arguments.workload]
    settings = {
        "folder": str(folder), "model": str(folder / "model"), "result": str(folder / "trl.json"),
        "prompts": PROMPTS, "samples": SAMPLES, "group": GROUP, "steps": arguments.steps + WARM_UP,
        "micro_batch": arguments.trl_micro_batch, "max_new_tokens": max_new_tokens, "ignore_eos": ignore_eos,
        "kl": KL, "learning_rate": LEARNING_RATE, "bf16": arguments.bf16,
    }  # fmt: skip
    (folder / "trl_settings.json").write_text(json.dumps(settings))
    command = [sys.executable, str(HERE / "trl_step.py"), str(folder / "trl_settings.json")]
    _call(command, [arguments.trl], {"OMP_NUM_THREADS": str(arguments.threads)})
    return json.loads((folder / "trl.json").read_text())


def _call(command: list[str], import_from: list[Path], variables: dict[str, str] | None = None) -> None:
    """Run a command without showing its output. If it fails, show the end of the output."""
    paths = [*map(str, import_from), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths), **(variables or {})}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed with code {done.returncode}:\n{done.stdout[-4000:]}")


def median(steps: list[Step]) -> Step:
    """The median of each figure."""
    return {name: statistics.median(step[name] for step in steps) for name in steps[0]}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("small", "medium"), default="small", help="0.8 or 28 million parameters")
    parser.add_argument(
        "--workload", choices=WORKLOADS, default="ragged", help="until the end token, or 64 tokens each"
    )
    parser.add_argument("--bf16", action="store_true", help="bf16 rollouts and autocast learning, on both sides")
    parser.add_argument("--steps", type=int, help="steps measured on each side and in each round")
    parser.add_argument("--rounds", type=int, default=1, help="how often each side is started")
    parser.add_argument("--threads", type=int, default=2, help="OpenMP threads of every process")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="changes to this project's config")
    parser.add_argument("--trl-micro-batch", type=int, default=SAMPLES, help="sequences of TRL's micro-batch")
    parser.add_argument("--trl", type=Path, default=HERE.parent / "build" / "trl", help="folder that holds TRL")
    parser.add_argument("--sides", nargs="+", choices=("service", "trl"), default=["service", "trl"])
    parser.add_argument("--quick", action="store_true", help="two steps, to see whether it works")
    arguments = parser.parse_args()
    arguments.steps = 2 if arguments.quick else arguments.steps or STEPS[arguments.size]
    if "trl" in arguments.sides and not (arguments.trl / "trl").is_dir():
        parser.error(
            f"{arguments.trl} does not hold TRL; install it with `pip install --no-deps --target build/trl "
            "-r requirements/benchmark.txt`, name its folder with --trl, or measure one side with --sides service"
        )
    return arguments


def main() -> None:
    arguments = parse()
    load = load_average()
    sides = {side: {"service": run_service, "trl": run_trl}[side] for side in arguments.sides}
    measured: dict[str, list[Step]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = build_model(folder / "model", arguments.size)
        rows = ({"prompt": [{"role": "user", "content": text}]} for text in make_prompts(PROMPTS))
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for _ in range(arguments.rounds):
            for side, run in sides.items():
                measured[side] += run(arguments, folder)[WARM_UP:]
    medians = {side: median(steps) for side, steps in measured.items()}
    columns = ("side", "steps", "tokens", "step s", "samples/s", *(f"{phase} s" for phase in PHASES))
    table = [
        (side, len(measured[side]), step["tokens"], step["step_s"], SAMPLES / step["step_s"],
         *(step.get(f"{phase}_s", "") for phase in PHASES))
        for side, step in medians.items()
    ]  # fmt: skip
    record = {
        "benchmark": "ppo_step",
        **{
            name: getattr(arguments, name) for name in ("size", "workload", "bf16", "threads", "steps", "rounds", "set")
        },
        "parameters": parameters,
        "load_before": load,
        **{f"{side}_samples_per_s": SAMPLES / step["step_s"] for side, step in medians.items()},
        "median": medians,
    }
    if len(medians) == 2:
        record["ratio"] = record["service_samples_per_s"] / record["trl_samples_per_s"]
    title = (
        f"GRPO step, {parameters / 1e6:.3g} M parameters, {arguments.workload}, {'bf16' if arguments.bf16 else 'fp32'}"
    )
    report(title, columns, table, record)


if __name__ == "__main__":
    main()
