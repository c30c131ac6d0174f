"""What Ray's agent of this node exports to Prometheus, for tests."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Callable, Iterable

import ray


def scrape(complete: Callable[[dict[str, float]], bool], timeout_s: float = 60.0) -> dict[str, float]:
    """The latest sample of each series (`name{labels}`), once `complete` says that all have come, or at the end of the time.

    Processes report to the agent of their node every few seconds.
    """
    node = next(node for node in ray.nodes() if node["Alive"])
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + timeout_s
    while True:
        text = urllib.request.urlopen(address, timeout=10).read().decode()
        samples = re.findall(r"^(\w+(?:\{.*\})?) (\S+)(?: \d+)?$", text, re.MULTILINE)
        series = {name: float(value) for name, value in samples}
        if complete(series) or time.monotonic() > deadline:
            return series
        time.sleep(0.5)


def names_of(series: Iterable[str]) -> set[str]:
    """Without labels."""
    return {name.partition("{")[0] for name in series}
