"""Puts the report together: what the folder holds, drawn, into one HTML page.

Invariants: the page loads nothing from anywhere, and its content security policy forbids it to; everything that a
model, a person or a file said is escaped by the template engine; the same folder gives the same page.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from rlhf_ray.report.charts import ppo_sections, stage_sections
from rlhf_ray.report.content import MAX_ANSWERS, ROUTINE_EVENTS, Answers, Content
from rlhf_ray.report.figures import clock, duration
from rlhf_ray.report.headlines import POLICY_NAMES, headlines
from rlhf_ray.report.output import output_file
from rlhf_ray.report.quality import quality_section
from rlhf_ray.report.reader import read_content
from rlhf_ray.report.shell import REPORT, Shell, fill
from rlhf_ray.runs.run_folder import RunFolder, atomic_write


@dataclass(frozen=True)
class Shown:
    """One answer on the page."""

    label: str
    colour: str
    """Name of a colour of the style sheet."""
    text: str
    reward: float | None
    utility: float | None


@dataclass(frozen=True)
class Answered:
    """A prompt and its answers."""

    prompt: tuple[object, ...]
    answers: tuple[Shown, ...]


def write_report(folder: RunFolder, path: Path | None = None) -> Path:
    """Write `report.html`, or `path`, from whatever the run's folder holds so far, replacing an older one; returns its
    path.

    Raises:
        OutputError: the path is no place for a file.
        DamagedRun: naming file and line, where a file of the run is damaged.
    """
    path = output_file(folder.report if path is None else path)
    atomic_write(path, render(read_content(folder)))
    return path


def render(content: Content, shell: Shell = REPORT) -> str:
    """The page as HTML text."""
    return fill(
        "report.html.jinja",
        shell,
        run=content,
        facts=_facts(content),
        headlines=headlines(content.evaluation),
        sections=ppo_sections(content.stages["ppo"]),
        stage_sections=[
            *stage_sections(content.stages["sft"], content.stages["reward_model"]),
            *quality_section(content.reward_quality),
        ],
        answers=[_answered(item) for item in islice(content.answers, MAX_ANSWERS)],
        routine_events=sorted(ROUTINE_EVENTS & content.event_counts.keys()),
    )


def shown(item: Answers, policy: str, label: str, colour: str) -> Shown:
    """What one policy answered."""
    return Shown(label, colour, item.answers[policy], item.rewards.get(policy), item.utility.get(policy))


def _answered(item: Answers) -> Answered:
    policies = [(policy, POLICY_NAMES.get(policy, policy)) for policy in item.answers]
    return Answered(
        item.prompt,
        tuple(shown(item, policy, label, policy if policy in POLICY_NAMES else "base") for policy, label in policies),
    )


def _facts(content: Content) -> list[str]:
    """What the line under the run's name says."""
    ppo = content.stages["ppo"]
    if ppo.last_step is None:
        return ["PPO has not recorded a step yet"]
    facts = [f"{ppo.last_step:,} PPO step{'s' if ppo.last_step != 1 else ''}"]
    if ppo.began is not None and ppo.ended is not None:
        facts += [f"in {duration(ppo.ended - ppo.began)}"] if len(ppo) > 1 else []
        facts.append(f"last on {clock(ppo.ended)}")
    return facts
