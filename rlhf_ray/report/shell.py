"""What is around every page: style, script, and the policy that lets a browser run and load nothing else."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import urlencode

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rlhf_ray.report.figures import clock, figure

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
