"""Several runs on one page: their results, the differences of their configurations, their curves and answers side by side.

Invariants: a run has the same colour and label on the whole page, in the order in which the runs were given; what one run lacks
is shown as missing, and hides nothing of the others.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from rlhf_ray.errors import InputError
from rlhf_ray.report.charts import SERIES_COLOURS, compared_sections
from rlhf_ray.report.headlines import POLICY_NAMES, STAGE_NAMES
from rlhf_ray.report.page import (
    REPORT,
    AnsweredPrompt,
    Layout,
    PolicyAnswer,
    output_file,
    policy_answer,
    render_template,
)
from rlhf_ray.report.reader import MAX_ANSWERS, STAGES, Answers, Content, read_content
from rlhf_ray.runs.run_folder import RunFolder, atomic_write
from rlhf_ray.telemetry.console import duration, figure

ABSENT = "—"


class ComparisonError(InputError, ValueError):
    """The runs cannot be compared."""


@dataclass(frozen=True)
class ComparedRun:
    """A run with its label and colour."""

    label: str
    colour: int
    """Index of the colour `--series-N` in the style sheet."""
    content: Content


def write_comparison(folders: Sequence[RunFolder], path: Path) -> Path:
    """Write a page that compares the runs, replacing an older one; returns its path.

    Raises:
        ComparisonError: a run is given twice, or there are more runs than colours.
        OutputError: the path cannot be written to.
        DamagedRun: a file of a run is damaged; the message names file and line.
    """
    path = output_file(path)
    labels = labels_of([folder.path for folder in folders])
    atomic_write(path, render_comparison(dict(zip(labels, map(read_content, folders), strict=True))))
    return path


def render_comparison(runs: Mapping[str, Content], layout: Layout = REPORT) -> str:
    """The page as HTML. `runs` is the content of the runs by label."""
    compared = [ComparedRun(label, colour, content) for colour, (label, content) in enumerate(runs.items(), start=1)]
    stages = {stage: {run.label: run.content.stages[stage] for run in compared} for stage in STAGES}
    config, unreadable = config_rows(runs)
    answers = _shared_answers(compared)
    tables: list[tuple[str, str, list[Row]]] = [
        ("Figures", "A dash means: not measured, or not yet.", figure_rows(list(runs.values()))),
        ("Configuration", "Only the keys that differ, with defaults and overrides applied.", config),
    ]
    return render_template(
        "comparison.html.jinja",
        layout,
        runs=compared,
        tables=tables,
        sections=compared_sections(stages),
        answers=answers[:MAX_ANSWERS],
        answers_total=len(answers),
        problems=[*(problem for content in runs.values() for problem in content.problems), *unreadable],
    )


def labels_of(paths: Sequence[Path]) -> list[str]:
    """A short label for each path: the folder's name, with as many parents as are needed to make it unique.

    Raises:
        ComparisonError: a path is given twice, or there are more paths than colours.
    """
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    if len(parts) > SERIES_COLOURS:
        raise ComparisonError(f"{len(parts)} runs are given; one chart can show at most {SERIES_COLOURS}")
    if twice := next((Path(*own) for own, count in Counter(parts).items() if count > 1), None):
        raise ComparisonError(f"{twice} is given twice; give each run once")
    depth = [1] * len(parts)
    while True:
        labels = ["/".join(own[-take:]) for own, take in zip(parts, depth, strict=True)]
        counts = Counter(labels)
        if len(counts) == len(labels):
            return labels
        depth = [take + (counts[label] > 1) for take, label in zip(depth, labels, strict=True)]


def _shared_answers(runs: Sequence[ComparedRun]) -> list[AnsweredPrompt]:
    """Prompts that at least two runs answered, each with the answers of the runs' last policies; those of most runs first."""
    by_prompt: dict[tuple[tuple[str, ...], ...], list[tuple[ComparedRun, Answers]]] = {}
    for run in runs:
        for item in run.content.answers:
            key = tuple(tuple(str(part) for pair in sorted(turn.items()) for part in pair) for turn in item.prompt)
            found = by_prompt.setdefault(key, [])
            if not found or found[-1][0] is not run:  # a prompt that a run answered twice counts once
                found.append((run, item))
    shared = sorted((found for found in by_prompt.values() if len(found) > 1), key=len, reverse=True)
    return [
        AnsweredPrompt(found[0][1].prompt, tuple(_last_answer(run, item) for run, item in found if item.answers))
        for found in shared
    ]


def _last_answer(run: ComparedRun, item: Answers) -> PolicyAnswer:
    policy = "ppo" if "ppo" in item.answers else list(item.answers)[-1]
    suffix = "" if policy == "ppo" else f" ({POLICY_NAMES.get(policy, policy)})"
    return policy_answer(item, policy, run.label + suffix, f"series-{run.colour}")


@dataclass(frozen=True)
class Cell:
    """The value of one run."""

    value: str = ABSENT
    detail: str = ""


@dataclass(frozen=True)
class Row:
    """One figure or config key, for all runs."""

    label: str
    cells: tuple[Cell, ...]


def figure_rows(runs: Sequence[Content]) -> list[Row]:
    """The main results; rows without any value are left out."""
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
    """The config keys whose values differ between runs, except for the name; and a message for each config that cannot be read.

    Args:
        runs: content of the runs by label.
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
        raise yaml.YAMLError("a mapping is expected")
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
    span = ""
    if interval and None not in interval:
        span = f"{figure(interval[0], '%')} to {figure(interval[1], '%')}"
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
