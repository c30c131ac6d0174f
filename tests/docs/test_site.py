"""The documentation site: built strictly, complete, and without anything that a browser would fetch from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_ray.telemetry.names import METRICS

ROOT = Path(__file__).parents[2]
_FETCHED = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?(https?:)?//|<link\b[^>]*\brel=\"?stylesheet[^>]*//|url\(\"?https?:"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return target


def test_pages_from_the_code(site):
    for page, words in {
        "configuration.html": "ppo.algorithm.kl",
        "api.html": "rlhf_ray.environments.base",
        "metrics.html": next(iter(METRICS)),
        "architecture.html": "types.py",
        "contributing.html": "make check",
        "changelog.html": "Unreleased",
        "adr/index.html": "Decisions",
    }.items():
        assert words in (site / page).read_text(), page
    assert (site / "source" / "configs" / "calculator-cpu.yaml").is_file()


def test_nothing_is_fetched_from_elsewhere(site):
    for file in [*site.rglob("*.html"), *site.rglob("*.css")]:
        found = _FETCHED.search(file.read_text())
        assert not found, f"{file.relative_to(site)}: {found and found[0]}"
