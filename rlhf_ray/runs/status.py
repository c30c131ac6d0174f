"""The status of a run in one object, read from its folder or from the status lines that its driver prints into a job's log.

Invariant: status lines are made by `read_status`, so both ways give the same status.
"""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhf_ray.errors import InputError
from rlhf_ray.runs.events import read_events
from rlhf_ray.runs.jsonl import damaged_line, last_record
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.telemetry.alerts import raised_alerts

PREFIX = "::rlhf-ray-status "
"""Start of a status line, which is meant for programs, in a job's log."""
_STAGE = re.compile(r"(?P<stage>\w+) (?P<change>begins|ends)")
_METRICS = ("step", "reward/mean", "kl/sequence", "loss", "throughput/tokens_per_s")
"""The metrics that a status shows."""


class DamagedConfig(InputError, ValueError):
    """A run's config.yaml cannot be read."""


@dataclass(frozen=True)
class RunStatus:
    """The newest recorded state. None means unknown, or not measured by this stage."""

    run: str
    stage: str | None = None
    """The last stage that began."""
    step: int | None = None
    """Optimizer steps done in a supervised stage, PPO steps otherwise."""
    steps: int | None = None
    """Total number of steps of the PPO stage."""
    reward: float | None = None
    kl: float | None = None
    """KL to the reference policy, in nats per response."""
    loss: float | None = None
    """Loss of a supervised stage."""
    throughput: float | None = None
    """Tokens per second."""
    faults: int = 0
    alerts: int = 0
    """Number of active alerts."""
    ended: bool = False
    """Whether the last stage of its config has ended."""

    def line(self) -> str:
        """The status line for a log."""
        return PREFIX + json.dumps(asdict(self))


def read_status(folder: RunFolder) -> RunStatus:
    """Read the status of a run, running or not, from its folder.

    Raises:
        DamagedLine: a line of events.jsonl or the last line of metrics.jsonl is damaged; the message names file and line.
        DamagedConfig: config.yaml cannot be read.
    """
    events = read_events(folder.events)
    changes = [match for event in events if (match := _STAGE.fullmatch(event.message))]
    stage = changes[-1]["stage"] if changes else None
    supervised = stage in ("sft", "reward_model")
    if stage is not None and supervised:
        members = folder.path.glob(f"{stage}*/metrics.jsonl")
        metrics = max(members, key=lambda path: path.stat().st_mtime, default=folder.stage_metrics(stage))
    else:
        metrics = folder.metrics
    last = _last_metrics(metrics)
    steps, stages = _steps_and_stages(folder.config)
    return RunStatus(
        run=folder.name,
        stage=stage,
        step=last.get("step"),
        steps=None if supervised else steps,
        reward=last.get("reward/mean"),
        kl=last.get("kl/sequence"),
        loss=last.get("loss"),
        throughput=last.get("throughput/tokens_per_s"),
        faults=sum(event.kind == "fault" for event in events),
        alerts=sum(alert.ended_at is None for alert in raised_alerts(events)),
        ended=stage is not None and changes[-1]["change"] == "ends" and stage in stages[-1:],
    )


def _last_metrics(metrics: Path) -> dict[str, Any]:
    """The newest record of a stage."""
    last = last_record(metrics) or {}
    for name in _METRICS:
        if not isinstance(last.get(name), int | float | None):
            problem = f"{name} is {last[name]!r}; a number or null is expected. Restore or remove the line."
            raise damaged_line(metrics, None, problem)
    return last


def _steps_and_stages(config: Path) -> tuple[int | None, list[Any]]:
    """The number of PPO steps and the stages in config.yaml; (None, []) if there is no file."""
    if not config.is_file():
        return None, []
    remedy = "Restore it from a copy, or delete it and resume the run with the same config, which writes it again."
    try:
        found = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise DamagedConfig(f"{config} is damaged: not YAML ({' '.join(str(error).split())}). {remedy}") from error
    if not isinstance(found, dict):
        problem = "empty" if found is None else f"{type(found).__name__} where a mapping is expected"
        raise DamagedConfig(f"{config} is damaged: {problem}. {remedy}")
    ppo, stages = found.get("ppo", {}), found.get("stages", [])
    if not (isinstance(ppo, dict) and isinstance(ppo.get("steps"), int | None) and isinstance(stages, list)):
        raise DamagedConfig(f"{config} is damaged: a number in ppo.steps and a list in stages are expected. {remedy}")
    return ppo.get("steps"), stages


def newest_status(lines: Iterable[str]) -> RunStatus | None:
    """The last status in the lines of a log; None if there is none."""
    found = None
    for line in lines:
        if line.startswith(PREFIX) and line.endswith("}"):
            found = RunStatus(**json.loads(line.removeprefix(PREFIX)))
    return found


def without_status(chunks: Iterable[str]) -> Iterator[str]:
    """Remove the status lines from a log that arrives in chunks."""
    rest = ""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split("\n")
        yield from (f"{line}\n" for line in lines if not line.startswith(PREFIX))
    if rest and not rest.startswith(PREFIX):
        yield rest


@contextmanager
def status_lines(folder: RunFolder, every_s: float = 2.0) -> Iterator[None]:
    """Print a status line when the status has changed, at most once per `every_s` seconds, and at the end of the block."""
    ended = threading.Event()

    def watch() -> None:
        printed = None
        while True:
            last = ended.wait(every_s)
            if (status := read_status(folder)) != printed:
                # One write for the whole line, because other threads print too.
                sys.stdout.write(f"{status.line()}\n")
                sys.stdout.flush()
                printed = status
            if last:
                return

    thread = threading.Thread(target=watch, name="status", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
