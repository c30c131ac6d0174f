"""Documents name files of the repository: every one that they name exists, and the architecture page stays short."""

from __future__ import annotations

import importlib.util
import re

import pytest

from tests.docs.commands import DOCUMENTS, ROOT

ARCHITECTURE = ROOT / "rlhf_ray" / "README.md"
PAGES = (*DOCUMENTS, ARCHITECTURE, *sorted((ROOT / "docs" / "adr").glob("*.md")))
_LINK = re.compile(r"\]\((?!https?://|#|mailto:)(?P<path>[^)#\s]+)")
_NAMED = re.compile(r"`(?P<path>(?:rlhf_ray|tests|docs|cluster|configs|requirements|benchmarks)/[\w/.-]+)`")
_MODULE = re.compile(r"`(?P<path>[a-z_]+(?:/[a-z_]+)*\.py)`")


@pytest.mark.parametrize("document", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_exists(document):
    text = document.read_text()
    missing = [link for link in _LINK.findall(text) if not (document.parent / link).exists()]
    if document.name not in ("contributing.md", "architecture.md"):
        missing += [path for path in _NAMED.findall(text) if not (ROOT / path).exists()]
    generated = {"configuration.md", "architecture.md", "contributing.md", "changelog.md"}
    assert not [path for path in missing if path not in generated]


def test_every_module_of_the_architecture_page_exists():
    named = _MODULE.findall(ARCHITECTURE.read_text())
    assert not [path for path in named if not (ARCHITECTURE.parent / path).is_file() and not (ROOT / path).is_file()]


def test_one_ppo_step_is_read_in_35_files():
    reading = ARCHITECTURE.read_text().partition("## One PPO step")[2].partition("\n## ")[0]
    assert 20 <= len(set(_MODULE.findall(reading))) <= 35
    assert len(ARCHITECTURE.read_text().splitlines()) <= 110


def test_modules_of_the_changelog_exist():
    now = [line.rpartition("|")[0].rpartition("|")[2] for line in (ROOT / "CHANGELOG.md").read_text().splitlines()]
    modules = {name for cell in now for name in re.findall(r"`(rlhf_ray[.\w]+)`", cell)}
    assert len(modules) > 10 and not [name for name in modules if importlib.util.find_spec(name) is None]


def test_every_room_is_on_the_architecture_page():
    package = ARCHITECTURE.parent
    rooms = [f"{path.parent.name}/" for path in package.glob("*/__init__.py")] + [
        path.name for path in package.glob("[a-z]*.py")
    ]
    text = ARCHITECTURE.read_text()
    assert not [room for room in rooms if f"`{room}`" not in text]
