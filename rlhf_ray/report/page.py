"""Renders the report of a run: the content of its folder and its charts in one HTML page.

Invariants: the page loads nothing, and its content security policy forbids loading; the template engine escapes everything that
comes from a model, a person or a file; the same folder always gives the same page.
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

_FOLDER = Path(__file__).parent


class OutputError(InputError, ValueError):
    """A page cannot be written to the requested path."""


@dataclass(frozen=True)
class Layout:
    """The parts of a page that do not depend on its content."""

    origin: str
    """A sentence that says what wrote the page."""
    home: str = ""
    """Relative address of the page with all runs; empty if there is none."""
    live_script: str = ""
    """JavaScript that runs after that of the charts."""
    templates: Path | None = None
    """A further folder of templates."""

    def run_address(self, label: str) -> str:
        """Relative address of a run's own page, on sites that have pages for runs."""
        return f"runs?{urlencode({'run': label})}"

    @property
    def style(self) -> str:
        """The style sheet (CSS)."""
        return _text("report.css")

    @property
    def script(self) -> str:
        """The only JavaScript that the page may run."""
        return _text("report.js") + self.live_script

    @property
    def policy(self) -> str:
        """The content security policy: nothing is loaded; a live page may send requests to its own server."""
        digest = base64.b64encode(hashlib.sha256(self.script.encode()).digest()).decode()
        live = "; connect-src 'self'; form-action 'self'; base-uri 'none'" if self.live_script else ""
        return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'{live}"


REPORT = Layout("Written by rlhf-ray report from the files in the run's folder.")


@dataclass(frozen=True)
class PolicyAnswer:
    """One answer on the page."""

    label: str
    colour: str
    """Name of a colour in the style sheet."""
    text: str
    reward: float | None
    utility: float | None


@dataclass(frozen=True)
class AnsweredPrompt:
    """A prompt and its answers on the page."""

    prompt: tuple[object, ...]
    answers: tuple[PolicyAnswer, ...]


def write_report(folder: RunFolder, path: Path | None = None) -> Path:
    """Write the report of what the run's folder holds so far, replacing an older one.

    Args:
        path: where to write it; None writes `report.html` in the run's folder.

    Returns:
        The path of the page.

    Raises:
        OutputError: the path cannot be written to.
        DamagedRun: a file of the run is damaged; the message names file and line.
    """
    path = output_file(folder.report if path is None else path)
    atomic_write(path, render_report(read_content(folder)))
    return path


def output_file(path: Path) -> Path:
    """The absolute path of a file that can be created or replaced.

    Raises OutputError if the path is a folder, or if its parent does not exist or is read-only.
    """
    path = path.absolute()
    if path.is_dir():
        raise OutputError(f"{path} is a folder; --output takes a file, such as {path / 'report.html'}")
    if not path.parent.is_dir():
        raise OutputError(
            f"{path} cannot be written: there is no folder {path.parent}. Create it, or give --output a file in an existing "
            "folder."
        )
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{path} cannot be written: you cannot write to {path.parent}. Give --output another file.")
    return path


def render_report(content: Content, layout: Layout = REPORT) -> str:
    """The report as HTML."""
    return render_template(
        "report.html.jinja",
        layout,
        run=content,
        facts=_facts(content),
        headlines=headlines(content.evaluation),
        sections=ppo_sections(content.stages["ppo"]),
        stage_sections=[
            *stage_sections(content.stages["sft"], content.stages["reward_model"]),
            *quality_section(content.reward_quality),
        ],
        answers=[_answered_prompt(item) for item in islice(content.answers, MAX_ANSWERS)],
        routine_events=sorted(ROUTINE_EVENTS & content.event_counts.keys()),
    )


def policy_answer(item: Answers, policy: str, label: str, colour: str) -> PolicyAnswer:
    """The answer of one policy, with the label and colour that it has on the page."""
    return PolicyAnswer(label, colour, item.answers[policy], item.rewards.get(policy), item.utility.get(policy))


def _answered_prompt(item: Answers) -> AnsweredPrompt:
    policies = [(policy, POLICY_NAMES.get(policy, policy)) for policy in item.answers]
    return AnsweredPrompt(
        item.prompt,
        tuple(
            policy_answer(item, policy, label, policy if policy in POLICY_NAMES else "base")
            for policy, label in policies
        ),
    )


def _facts(content: Content) -> list[str]:
    """The parts of the line below the name of the run."""
    ppo = content.stages["ppo"]
    if ppo.last_step is None:
        return ["PPO has not recorded a step yet"]
    facts = [f"{ppo.last_step:,} PPO step{'s' if ppo.last_step != 1 else ''}"]
    if ppo.began is not None and ppo.ended is not None:
        facts += [f"in {duration(ppo.ended - ppo.began)}"] if len(ppo) > 1 else []
        facts.append(f"last on {clock(ppo.ended)}")
    return facts


def render_template(template: str, layout: Layout, **values: object) -> str:
    """Render a template as HTML."""
    return _environment(layout.templates).get_template(template).render(layout=layout, **values)


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
