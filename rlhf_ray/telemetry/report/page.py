"""Puts the report together: what the folder holds, drawn, into one HTML page.

Invariants: the page loads nothing from anywhere, and its content security policy forbids it to; everything that a
model, a person or a file said is escaped by the template engine; the same folder gives the same page.
"""

from __future__ import annotations

import base64
import hashlib
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rlhf_ray.telemetry.report.charts import ppo_sections, stage_sections
from rlhf_ray.telemetry.report.content import ROUTINE_EVENTS, Content, read_content
from rlhf_ray.telemetry.report.figures import duration, figure
from rlhf_ray.telemetry.report.headlines import POLICY_NAMES, headlines
from rlhf_ray.telemetry.report.quality import quality_section
from rlhf_ray.telemetry.run_folder import RunFolder, atomic_write

_FOLDER = Path(__file__).parent


def write_report(folder: RunFolder) -> Path:
    """Write `report.html` from whatever the run's folder holds so far, replacing an older one; returns its path.

    Raises ValueError, naming file and line, where a file of the run is damaged.
    """
    atomic_write(folder.report, render(read_content(folder)))
    return folder.report


def render(content: Content) -> str:
    """The page as HTML text."""
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": figure, "clock": _clock}
    script = (_FOLDER / "report.js").read_text(encoding="utf-8")
    return environment.get_template("report.html.jinja").render(
        run=content,
        facts=_facts(content),
        headlines=headlines(content.evaluation),
        sections=ppo_sections(content.stages["ppo"]),
        stage_sections=[
            *stage_sections(content.stages["sft"], content.stages["reward_model"]),
            *quality_section(content.reward_quality),
        ],
        policy_names=POLICY_NAMES,
        routine_events=sorted(ROUTINE_EVENTS & content.event_counts.keys()),
        style=(_FOLDER / "report.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _facts(content: Content) -> list[str]:
    """What the line under the run's name says."""
    records = content.stages["ppo"]
    if not records:
        return ["PPO has not recorded a step yet"]
    steps = records[-1]["step"]
    facts = [f"{steps:,} PPO step{'s' if steps != 1 else ''}"]
    if len(records) > 1:
        facts.append(f"in {duration(records[-1]['timestamp'] - records[0]['timestamp'])}")
    facts.append(f"last on {_clock(records[-1]['timestamp'])}")
    return facts


def _clock(seconds: float) -> str:
    """Seconds since the epoch as date and time, UTC."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
