"""Weight synchronisation from a learner to one rollout worker, against a memcpy of the same bytes: time by part, and memory.

`publish` is `RolloutPool.sync_weights` as the driver calls it. The parts are the same calls on the same actors, one after
another; in a synchronisation packing, sending and loading overlap, so the sum of the parts may exceed it. Memory is the peak of
each process's own memory above its value before the first synchronisation; `store` is the same for Ray's object store, which
exceeds the buckets in use, because Ray returns freed objects once a second.
Usage: `python benchmarks/weights.py [--cases medium:16 large:16 large:64] [--quick]`, each case SIZE:BUCKET_MIB.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import threading
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import numpy as np
import ray
from common import build_model, load_average, report

from rlhf_ray.config.algorithm import AlgorithmConfig
from rlhf_ray.config.learner import LearnerConfig
from rlhf_ray.config.rollout import RolloutConfig, SamplingConfig, WeightChannelConfig
from rlhf_ray.config.section import Workers
from rlhf_ray.learner.actor import LearnerSpec
from rlhf_ray.learner.group import LearnerGroup
from rlhf_ray.rollout.pool import RolloutPool

MIB = 1 << 20
PARTS = ("pack, store", "begin", "load", "finish", "probe")


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
    """The growth of some processes' memory at its peak, sampled in a thread."""

    def __init__(self, pids: dict[str, int]) -> None:
        self._pids = pids
        self._before = self._look()
        self._peak = dict(self._before)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def growth_mib(self) -> dict[str, float]:
        """MiB by process and kind of memory."""
        return {name: (peak - self._before[name]) / 1024 for name, peak in self._peak.items()}

    def _watch(self) -> None:
        while not self._ended.wait(0.002):
            now = self._look()
            self._peak = {name: max(peak, now[name]) for name, peak in self._peak.items()}

    def _look(self) -> dict[str, int]:
        """KiB of each process's own memory and of the object store memory that it has mapped (man 5 proc)."""
        found = {}
        for process, pid in self._pids.items():
            fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            for kind, field in (("own", "RssAnon"), ("store", "RssShmem")):
                found[f"{process}_{kind}"] = int(fields[field].split()[0])
        return found


async def timed(call: Awaitable) -> float:
    """Seconds that an await takes."""
    began = time.perf_counter()
    await call
    return time.perf_counter() - began


async def by_part(learner: LearnerGroup, pool: RolloutPool, version: int, bucket_mib: int) -> dict[str, float]:
    """Seconds of each part of a synchronisation, run one after another."""
    rank, worker = learner.ranks[0], pool.workers[0].actor
    tokens = np.arange(32, dtype=np.int32) + 2
    began = time.perf_counter()
    stream = rank.weight_buckets.options(num_returns="streaming").remote(bucket_mib * MIB)
    buckets = [bucket async for bucket in stream]  # references only; nothing is fetched
    seconds = {"pack, store": time.perf_counter() - began}
    seconds["begin"] = await timed(worker.start_weight_update.remote())
    seconds["load"] = sum([await timed(worker.update_weights.remote(bucket)) for bucket in buckets])
    seconds["finish"] = await timed(worker.finish_weight_update.remote(version))
    seconds["probe"] = await timed(asyncio.gather(learner.probe_logprobs(tokens), worker.probe.remote(tokens)))
    return seconds


async def measure(model: Path, parameters: int, size: str, bucket_mib: int, repeats: int) -> dict[str, Any]:
    """One case: memory over the first three synchronisations, then median times of several."""
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
    await learner.probe_logprobs(np.arange(32, dtype=np.int32))  # the cost of a first forward pass is not counted
    with Memory({"learner": await learner.ranks[0].pid.remote(), "worker": pool.workers[0].info.pid}) as memory:
        for version in (1, 2, 3):
            await pool.sync_weights(version, learner)
    whole = [await timed(pool.sync_weights(4 + number, learner)) for number in range(repeats)]
    parts = [await by_part(learner, pool, 3 + repeats, bucket_mib) for _ in range(repeats)]
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
        "growth_mib": memory.growth_mib,
        "parts_s": {part: statistics.median(seconds[part] for seconds in parts) for part in PARTS},
    }


def row(result: dict[str, Any]) -> tuple:
    """A row of the table."""
    parts = (result["parts_s"][part] * 1e3 for part in PARTS)
    return (
        f"{result['parameters'] / 1e6:.3g} M",
        result["bytes"] / MIB,
        result["bucket_mib"],
        result["publish_s"] * 1e3,
        result["memcpy_s"] * 1e3,
        result["ratio"],
        *parts,
        *(result["growth_mib"][name] for name in ("learner_own", "worker_own", "worker_store")),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["medium:16", "large:16", "large:64"], metavar="SIZE:MIB")
    parser.add_argument("--repeats", type=int, default=7, help="synchronisations that are timed")
    parser.add_argument(
        "--quick", action="store_true", help="two synchronisations of the small model, to see whether it works"
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
    columns = ("parameters", "MiB", "bucket", "publish ms", "memcpy ms", "ratio", *PARTS,
               "learner MiB", "worker MiB", "store MiB")  # fmt: skip
    record = {"benchmark": "weights", "repeats": arguments.repeats, "load_before": load, "results": results}
    report(
        "Weight synchronisation through the object store, learner to one worker",
        columns,
        [row(r) for r in results],
        record,
    )


if __name__ == "__main__":
    main()
