"""Several runs on one page: their figures, what their configurations differ in, their curves and answers side by side.

Invariants: a run has one colour and one label on the whole page, in the order in which the runs were given; a run that
lacks something shows that it does, and hides nothing of the others.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_ray.errors import InputError
from rlhf_ray.report.charts import SERIES_COLOURS, compared_sections
from rlhf_ray.report.content import MAX_ANSWERS, STAGES, Answers, Content
from rlhf_ray.report.differences import Row, config_rows, figure_rows
from rlhf_ray.report.headlines import POLICY_NAMES
from rlhf_ray.report.output import output_file
from rlhf_ray.report.page import Answered, Shown, shown
from rlhf_ray.report.reader import read_content
from rlhf_ray.report.shell import REPORT, Shell, fill
from rlhf_ray.runs.run_folder import RunFolder, atomic_write


class ComparisonError(InputError, ValueError):
    """These runs cannot be compared."""


@dataclass(frozen=True)
class Compared:
    """One of the runs."""

    label: str
    colour: int
    """Index of the style sheet's `--series-N`."""
    content: Content


def write_comparison(folders: Sequence[RunFolder], path: Path) -> Path:
    """Write a page with all of these runs, replacing an older one; returns its path.

    Raises:
        ComparisonError: one is given twice, or there are more than colours.
        OutputError: the path is no place for a file.
        DamagedRun: naming file and line, where a file of a run is damaged.
    """
    path = output_file(path)
    labels = labels_of([folder.path for folder in folders])
    atomic_write(path, render_comparison(dict(zip(labels, map(read_content, folders), strict=True))))
    return path


def render_comparison(runs: Mapping[str, Content], shell: Shell = REPORT) -> str:
    """The page as HTML text, from label to run."""
    compared = [Compared(label, colour, content) for colour, (label, content) in enumerate(runs.items(), start=1)]
    stages = {stage: {run.label: run.content.stages[stage] for run in compared} for stage in STAGES}
    config, unreadable = config_rows(runs)
    answers = _shared_answers(compared)
    tables: list[tuple[str, str, list[Row]]] = [
        ("Figures", "A dash: not measured, or not yet.", figure_rows(list(runs.values()))),
        ("Configuration", "Only what differs, as it was resolved.", config),
    ]
    return fill(
        "comparison.html.jinja",
        shell,
        runs=compared,
        tables=tables,
        sections=compared_sections(stages),
        answers=answers[:MAX_ANSWERS],
        answers_total=len(answers),
        problems=[*(problem for content in runs.values() for problem in content.problems), *unreadable],
    )


def labels_of(paths: Sequence[Path]) -> list[str]:
    """A short name for each: the folder's, with as many of its parents as tell it from the others.

    Raises:
        ComparisonError: one is given twice, or there are more than colours.
    """
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    if len(parts) > SERIES_COLOURS:
        raise ComparisonError(f"{len(parts)} runs; at most {SERIES_COLOURS} can be told apart in one chart")
    if twice := next((Path(*own) for own, count in Counter(parts).items() if count > 1), None):
        raise ComparisonError(f"{twice} is given twice; name each run once")
    depth = [1] * len(parts)
    while True:
        labels = ["/".join(own[-take:]) for own, take in zip(parts, depth, strict=True)]
        counts = Counter(labels)
        if len(counts) == len(labels):
            return labels
        depth = [take + (counts[label] > 1) for take, label in zip(depth, labels, strict=True)]


def _shared_answers(runs: Sequence[Compared]) -> list[Answered]:
    """Prompts that at least two runs answered, those of most runs first, each with the answers of the runs' last policies."""
    by_prompt: dict[tuple[tuple[str, ...], ...], list[tuple[Compared, Answers]]] = {}
    for run in runs:
        for item in run.content.answers:
            key = tuple(tuple(str(part) for pair in sorted(turn.items()) for part in pair) for turn in item.prompt)
            found = by_prompt.setdefault(key, [])
            if not found or found[-1][0] is not run:  # a prompt that a run was asked twice counts once
                found.append((run, item))
    shared = sorted((found for found in by_prompt.values() if len(found) > 1), key=len, reverse=True)
    return [
        Answered(found[0][1].prompt, tuple(_last_answer(run, item) for run, item in found if item.answers))
        for found in shared
    ]


def _last_answer(run: Compared, item: Answers) -> Shown:
    policy = "ppo" if "ppo" in item.answers else list(item.answers)[-1]
    suffix = "" if policy == "ppo" else f" ({POLICY_NAMES.get(policy, policy)})"
    return shown(item, policy, run.label + suffix, f"series-{run.colour}")
