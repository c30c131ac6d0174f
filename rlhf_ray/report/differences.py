"""Tables with a column for each run: their figures, and the keys in which their configurations differ.

Invariant: every row has a cell for every run; a dash stands where a run has no such figure or key.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import yaml

from rlhf_ray.report.content import Content
from rlhf_ray.report.figures import duration, figure
from rlhf_ray.report.headlines import STAGE_NAMES

ABSENT = "—"


@dataclass(frozen=True)
class Cell:
    """What one run says."""

    value: str = ABSENT
    detail: str = ""


@dataclass(frozen=True)
class Row:
    """One figure or key of all runs."""

    label: str
    cells: tuple[Cell, ...]


def figure_rows(runs: Sequence[Content]) -> list[Row]:
    """The headline figures; rows that no run has are left out."""
    known = [run.evaluation or {} for run in runs]
    rows = [
        Row("Win rate against SFT", tuple(map(_win_rate, known))),
        Row("Hidden utility", tuple(map(_utility, known))),
        Row("KL to the reference", tuple(_cell(found.get("kl_sequence"), "nats") for found in known)),
        Row("Answer length", tuple(map(_length, known))),
        Row("Reward model accuracy", tuple(map(_accuracy, known))),
        Row(
            "PPO steps", tuple(Cell(ABSENT if (n := run.stages["ppo"].last_step) is None else f"{n:,}") for run in runs)
        ),
        Row("Reward, last step", tuple(_cell(run.stages["ppo"].last("reward/mean")) for run in runs)),
        Row("KL, last step", tuple(_cell(run.stages["ppo"].last("kl/sequence"), "nats") for run in runs)),
        *_seconds(known),
        Row("Faults", tuple(Cell(f"{run.event_counts.get('fault', 0):,}") for run in runs)),
    ]
    return [row for row in rows if any(cell.value != ABSENT for cell in row.cells)]


def config_rows(runs: Mapping[str, Content]) -> tuple[list[Row], list[str]]:
    """The keys whose values are not the same in all runs, from label to run; and what could not be read.

    The name, which always differs, is the run's label.
    """
    flat: list[Mapping[str, str]] = []
    problems: list[str] = []
    for label, run in runs.items():
        try:
            flat.append(_flat_config(run.config or ""))
        except yaml.YAMLError as error:
            flat.append({})
            problems.append(f"{label}: config.yaml is not YAML ({' '.join(str(error).split())})")
    keys = dict.fromkeys(key for config in flat for key in config)
    values = ((key, [config.get(key, ABSENT) for config in flat]) for key in keys if key != "name")
    return [Row(key, tuple(map(Cell, found))) for key, found in values if len(set(found)) > 1], problems


@lru_cache(maxsize=64)
def _flat_config(text: str) -> Mapping[str, str]:
    config = yaml.safe_load(text) or {}
    if not isinstance(config, Mapping):
        raise yaml.YAMLError("a mapping was expected")
    return dict(_flatten("", config))


def _flatten(prefix: str, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(f"{prefix}{key}.", value)
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, default=str)


def _cell(value: float | None, unit: str = "") -> Cell:
    return Cell(figure(value, unit))


def _win_rate(found: Mapping[str, Any]) -> Cell:
    interval = found.get("win_rate_interval")
    whole = interval and None not in interval
    span = f"{figure(interval[0], '%')} to {figure(interval[1], '%')}" if whole else ""
    return Cell(figure(found.get("win_rate_vs_sft"), "%"), span)


def _utility(found: Mapping[str, Any]) -> Cell:
    worth, spread = found.get("utility") or {}, found.get("utility_std_sft")
    before, after = worth.get("sft"), worth.get("ppo")
    if before is None or after is None:
        return _cell(after)
    gain = f", {(after - before) / spread:+.2f} std".replace("-", "−") if spread else ""
    return Cell(figure(after), f"SFT {figure(before)}{gain}")


def _length(found: Mapping[str, Any]) -> Cell:
    length = found.get("length") or {}
    before = length.get("sft")
    return Cell(figure(length.get("ppo"), "tokens"), "" if before is None else f"SFT {figure(before)}")


def _accuracy(found: Mapping[str, Any]) -> Cell:
    accuracy, ceiling = found.get("reward_model_accuracy"), found.get("reward_model_accuracy_ceiling")
    share = f"{figure(accuracy / ceiling, '%')} of the ceiling" if accuracy is not None and ceiling else ""
    return Cell(figure(accuracy, "%"), share)


def _seconds(known: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    times = [{stage: s for stage, s in (found.get("seconds") or {}).items() if s is not None} for found in known]
    for stage in dict.fromkeys(stage for found in times for stage in found):
        label = STAGE_NAMES.get(stage, stage.replace("_", " "))
        cells = tuple(Cell(duration(found[stage])) if stage in found else Cell() for found in times)
        yield Row(f"Time: {label}", cells)
    yield Row("Time: all stages", tuple(Cell(duration(sum(found.values()))) if found else Cell() for found in times))
