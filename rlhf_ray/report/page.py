"""Puts the report together: what the folder holds, drawn, into one HTML page.

Invariants: the page loads nothing from anywhere, and its content security policy forbids it to; everything that a
model, a person or a file said is escaped by the template engine; the same folder gives the same page.
"""

from __future__ import annotations

import base64
import hashlib
import os
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from urllib.parse import urlencode

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rlhf_ray.errors import InputError
from rlhf_ray.report.charts import ppo_sections, stage_sections
from rlhf_ray.report.headlines import POLICY_NAMES, headlines, quality_section
from rlhf_ray.report.reader import MAX_ANSWERS, ROUTINE_EVENTS, Answers, Content, read_content
from rlhf_ray.runs.run_folder import RunFolder, atomic_write
from rlhf_ray.telemetry.console import clock, duration, figure


class OutputError(InputError, ValueError):
    """A page cannot be written where it should be."""


def output_file(path: Path) -> Path:
    """The path, absolute, of a file that can be written or replaced.

    Raises OutputError where it is a folder, or is in none that exists and may be written in.
    """
    path = path.absolute()
    if path.is_dir():
        raise OutputError(f"{path} is a folder; --output takes a file, such as {path / 'report.html'}")
    if not path.parent.is_dir():
        raise OutputError(
            f"{path} cannot be written: there is no folder {path.parent}. Create it, or give --output a file in one "
            "that exists."
        )
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{path} cannot be written: {path.parent} is read-only for you. Give --output another file.")
    return path


_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Shell:
    """Constant parts of a page."""

    origin: str
    """A sentence that says who wrote the page."""
    home: str = ""
    """Relative address of the page with all runs; empty where there is none."""
    live_script: str = ""
    """Runs after the charts' own script."""
    templates: Path | None = None
    """Folder of templates beside this package's."""

    def run_address(self, label: str) -> str:
        """Relative address of a run's own page, where there are pages for runs."""
        return f"runs?{urlencode({'run': label})}"

    @property
    def style(self) -> str:
        """CSS."""
        return _text("report.css")

    @property
    def script(self) -> str:
        """JavaScript, the only one that the page may run."""
        return _text("report.js") + self.live_script

    @property
    def policy(self) -> str:
        """The content security policy: nothing is loaded; a live page may ask the server that it came from."""
        digest = base64.b64encode(hashlib.sha256(self.script.encode()).digest()).decode()
        live = "; connect-src 'self'; form-action 'self'; base-uri 'none'" if self.live_script else ""
        return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'{live}"


REPORT = Shell("Written by rlhf-ray report from the files of the run's folder.")


def fill(template: str, shell: Shell, **values: object) -> str:
    """A page of a template, as HTML text."""
    return _environment(shell.templates).get_template(template).render(shell=shell, **values)


@cache
def _environment(templates: Path | None) -> Environment:
    environment = Environment(
        loader=FileSystemLoader([_FOLDER, *([templates] if templates else [])]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": figure, "clock": clock}
    return environment


@cache
def _text(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


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
