"""Where a run stands, in one object: read from its folder, or from the lines that a job's driver prints for whoever watches it.

Invariant: a line is made from the folder by the same `read_status`, so both say the same.
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
from rlhf_ray.telemetry.alerts import raised_alerts
from rlhf_ray.runs.events import read_events
from rlhf_ray.runs.jsonl import damaged, last_record
from rlhf_ray.runs.run_folder import RunFolder

MARK = "::rlhf-ray-status "
"""Begins a line for programs in a job's log."""
_STAGE = re.compile(r"(?P<stage>\w+) (?P<what>begins|ends)")
_FIGURES = ("step", "reward/mean", "kl/sequence", "loss", "throughput/tokens_per_s")
"""What a status takes from a record."""


class DamagedConfig(InputError, ValueError):
    """A run's config.yaml is not what a run writes."""


@dataclass(frozen=True)
class RunStatus:
    """What the newest records say. None: not known, or not measured by this stage."""

    run: str
    stage: str | None = None
    """The last one that began."""
    step: int | None = None
    """Optimizer steps done in a supervised stage, PPO steps otherwise."""
    steps: int | None = None
    """Of the whole PPO stage."""
    reward: float | None = None
    kl: float | None = None
    """Nats per response, to the reference."""
    loss: float | None = None
    """Of a supervised stage."""
    throughput: float | None = None
    """Tokens per second."""
    faults: int = 0
    alerts: int = 0
    """That last."""
    ended: bool = False
    """Whether the last stage of its config has ended."""

    def line(self) -> str:
        """For a log."""
        return MARK + json.dumps(asdict(self))


def read_status(folder: RunFolder) -> RunStatus:
    """Of a run's folder, whether it runs or not.

    Raises:
        DamagedLine: naming file and line, where one of events.jsonl or the last one of metrics.jsonl is damaged.
        DamagedConfig: where config.yaml is.
    """
    events = read_events(folder.events)
    turns = [match for event in events if (match := _STAGE.fullmatch(event.message))]
    stage = turns[-1]["stage"] if turns else None
    supervised = stage in ("sft", "reward_model")
    if supervised:
        members = [path for path in folder.path.glob(f"{stage}*/metrics.jsonl")]
        metrics = max(members, key=lambda path: path.stat().st_mtime, default=folder.stage_metrics(stage))
    else:
        metrics = folder.metrics
    last = _figures(metrics)
    steps, stages = _plan(folder.config)
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
        alerts=sum(alert.over_at is None for alert in raised_alerts(events)),
        ended=stage is not None and turns[-1]["what"] == "ends" and stage in stages[-1:],
    )


def _figures(metrics: Path) -> dict[str, Any]:
    """The newest record of a stage."""
    last = last_record(metrics) or {}
    for name in _FIGURES:
        if not isinstance(last.get(name), int | float | None):
            what = f"{name} is {last[name]!r}; a number or null is expected. Restore or remove the line."
            raise damaged(metrics, None, what)
    return last


def _plan(config: Path) -> tuple[int | None, list[Any]]:
    """The steps of PPO and the stages that a config.yaml has; nothing where there is no file."""
    if not config.is_file():
        return None, []
    remedy = "Restore it from a copy, or delete it and resume the run with the same config, which writes it anew."
    try:
        found = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise DamagedConfig(f"{config} is damaged: not YAML ({' '.join(str(error).split())}). {remedy}") from error
    if not isinstance(found, dict):
        what = "empty" if found is None else f"{type(found).__name__} where a mapping is expected"
        raise DamagedConfig(f"{config} is damaged: {what}. {remedy}")
    ppo, stages = found.get("ppo", {}), found.get("stages", [])
    if not (isinstance(ppo, dict) and isinstance(ppo.get("steps"), int | None) and isinstance(stages, list)):
        raise DamagedConfig(f"{config} is damaged: a number in ppo.steps and a list in stages are expected. {remedy}")
    return ppo.get("steps"), stages


def newest_status(lines: Iterable[str]) -> RunStatus | None:
    """The last status in lines of a log; None where there is none."""
    found = None
    for line in lines:
        if line.startswith(MARK) and line.endswith("}"):
            found = RunStatus(**json.loads(line.removeprefix(MARK)))
    return found


def without_status(chunks: Iterable[str]) -> Iterator[str]:
    """The text of a log that arrives in pieces, without the lines for programs."""
    rest = ""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split("\n")
        yield from (f"{line}\n" for line in lines if not line.startswith(MARK))
    if rest and not rest.startswith(MARK):
        yield rest


@contextmanager
def status_lines(folder: RunFolder, every_s: float = 2.0) -> Iterator[None]:
    """Print a line whenever the status has changed, at most every so many seconds, and at the end."""
    ended = threading.Event()

    def watch() -> None:
        said = None
        while True:
            last = ended.wait(every_s)
            if (status := read_status(folder)) != said:
                # In one piece: other threads print, too.
                sys.stdout.write(f"{status.line()}\n")
                sys.stdout.flush()
                said = status
            if last:
                return

    thread = threading.Thread(target=watch, name="status", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
