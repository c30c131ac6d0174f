"""The recipes of docs/algorithms.md: what people copy is what is tested."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from rlhf_ray.config import RunConfig, load_config

DOCUMENT = Path(__file__).parents[1] / "docs" / "algorithms.md"
_RECIPE = re.compile(r"^### (?P<name>[^\n]+)\n```yaml\n(?P<fragment>.+?)^```$", re.MULTILINE | re.DOTALL)
RECIPES = {match["name"]: match["fragment"] for match in _RECIPE.finditer(DOCUMENT.read_text())}
"""YAML fragments by name."""

_REST = """
name: recipe
model: {path: policy}
data: {demonstrations: {location: demonstrations.jsonl}, pairs: {location: pairs.jsonl}, prompts: {location: prompts.jsonl}}
"""


def load_recipe(name: str, folder: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """A recipe in a config file that has the rest, read as any config file is."""
    path = folder / "recipe.yaml"
    path.write_text(_REST + RECIPES[name])
    return load_config(path, overrides)
