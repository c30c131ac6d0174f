"""A publication from a learner to one rollout worker, against a memcpy of the same bytes: time by part, and memory.

`publish` is `RolloutPool.publish` as the driver calls it. The parts are the same calls on the same actors, one after another;
in a publication packing, sending and loading overlap, so their sum may exceed it. Memory is how far each process's resident set
(shared memory that it looked at included) rose above what it was before its first publication.
Usage: `python benchmarks/weights.py [--cases medium:16 large:16 large:64] [--quick]`, each case SIZE:BUCKET_MIB.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import numpy as np
import ray
from common import build_model, load_average, report

from rlhf_ray.config.algorithm import AlgorithmConfig
from rlhf_ray.config.learner import LearnerConfig
from rlhf_ray.config.resources import Workers
from rlhf_ray.config.rollout import RolloutConfig, SamplingConfig, WeightChannelConfig
from rlhf_ray.learner.actor import LearnerSpec
from rlhf_ray.learner.group import LearnerGroup
from rlhf_ray.rollout.pool import RolloutPool

MIB = 1 << 20
PARTS = ("pack and store", "begin", "transfer and load", "finish", "probe")


def memcpy_seconds(size: int, repeats: int) -> float:
    """Median time to copy `size` bytes within one process, into memory that has been written to before."""
    source, target = np.ones(size, dtype=np.uint8), np.ones(size, dtype=np.uint8)
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


class Memory:
    """The resident set of a process on this machine."""

    def __init__(self, pid: int) -> None:
        self._folder = Path(f"/proc/{pid}")
        (self._folder / "clear_refs").write_text("5")  # the peak starts again from now (man 5 proc)
        self._before = self._read("VmRSS")

    def growth(self) -> float:
        """MiB from then to the peak since."""
        return (self._read("VmHWM") - self._before) / 1024

    def _read(self, field: str) -> int:
        lines = (self._folder / "status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


async def timed(call: Awaitable) -> float:
    """Seconds that an await takes."""
    began = time.perf_counter()
    await call
    return time.perf_counter() - began


async def by_part(learner: LearnerGroup, pool: RolloutPool, version: int, bucket_mib: int) -> dict[str, float]:
    """Seconds of each part of a publication, done one after another."""
    rank, worker = learner.ranks[0], pool.members[0].actor
    tokens = np.arange(32, dtype=np.int32) + 2
    began = time.perf_counter()
    stream = rank.weight_buckets.options(num_returns="streaming").remote(bucket_mib * MIB)
    buckets = [bucket async for bucket in stream]  # references: nothing is fetched
    seconds = {"pack and store": time.perf_counter() - began}
    seconds["begin"] = await timed(worker.start_weight_update.remote())
    seconds["transfer and load"] = sum([await timed(worker.update_weights.remote(bucket)) for bucket in buckets])
    seconds["finish"] = await timed(worker.finish_weight_update.remote(version))
    seconds["probe"] = await timed(asyncio.gather(learner.probe_logprobs(tokens), worker.probe.remote(tokens)))
    return seconds


async def measure(model: Path, parameters: int, size: str, bucket_mib: int, repeats: int) -> dict[str, Any]:
    """One case: the first publication's memory, then the median times of several."""
    environment = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    options = {"num_cpus": 0, "runtime_env": {"env_vars": environment}}
    config = RolloutConfig(
        workers=Workers(cpus=0),
        sampling=SamplingConfig(max_new_tokens=16),
        weights=WeightChannelConfig(bucket_mb=float(bucket_mib)),
    )
    spec = LearnerSpec("policy", str(model), LearnerConfig(workers=Workers(cpus=0)), AlgorithmConfig())
    pool = RolloutPool(config)
    learner, _ = await asyncio.gather(
        LearnerGroup.start(spec, lambda index: options), pool.start(str(model), 64, 0, lambda index: options)
    )
    await learner.probe_logprobs(np.arange(32, dtype=np.int32))  # what a first forward pass takes is not publication
    pids = {"learner": await learner.ranks[0].pid.remote(), "worker": pool.members[0].info.pid}
    memory = {side: Memory(pid) for side, pid in pids.items()}
    await pool.publish(1, learner)
    growth = {f"{side}_growth_mib": peak.growth() for side, peak in memory.items()}
    whole = [await timed(pool.publish(2 + number, learner)) for number in range(repeats)]
    parts = [await by_part(learner, pool, 1 + repeats, bucket_mib) for _ in range(repeats)]
    await pool.close()
    learner.close()
    publish, copy = statistics.median(whole), memcpy_seconds(parameters * 4, repeats)
    return {
        "size": size,
        "parameters": parameters,
        "bytes": parameters * 4,
        "bucket_mib": bucket_mib,
        "publish_s": publish,
        "memcpy_s": copy,
        "ratio": publish / copy,
        **growth,
        "parts_s": {part: statistics.median(seconds[part] for seconds in parts) for part in PARTS},
    }


def row(result: dict[str, Any]) -> tuple:
    """Of the table."""
    parts = (result["parts_s"][part] * 1e3 for part in PARTS)
    return (
        f"{result['parameters'] / 1e6:.2g} M",
        result["bytes"] / MIB,
        result["bucket_mib"],
        result["publish_s"] * 1e3,
        result["memcpy_s"] * 1e3,
        result["ratio"],
        *parts,
        result["learner_growth_mib"],
        result["worker_growth_mib"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["medium:16", "large:16", "large:64"], metavar="SIZE:MIB")
    parser.add_argument("--repeats", type=int, default=7, help="publications that are timed")
    parser.add_argument(
        "--quick", action="store_true", help="two publications of the small model: does it work at all?"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.cases, arguments.repeats = ["small:1"], 2
    cases = [(size, int(mib)) for size, _, mib in (case.partition(":") for case in arguments.cases)]
    load = load_average()
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    results = []
    with tempfile.TemporaryDirectory() as name:
        parameters = {size: build_model(Path(name) / size, size) for size in dict(cases)}
        for size, mib in cases:
            case = measure(Path(name) / size, parameters[size], size, mib, arguments.repeats)
            results.append(asyncio.run(case))
    ray.shutdown()
    columns = ("parameters", "MiB", "bucket", "publish ms", "memcpy ms", "ratio", *(f"{part} ms" for part in PARTS),
               "learner +MiB", "worker +MiB")  # fmt: skip
    record = {"benchmark": "weights", "repeats": arguments.repeats, "load_before": load, "results": results}
    report("Publication through the object store, learner to one worker", columns, [row(r) for r in results], record)


if __name__ == "__main__":
    main()
