"""Recipes by name, and the quickstart from an empty folder."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from rlhf_ray import recipes
from rlhf_ray.cli import app
from rlhf_ray.config import load_config
from rlhf_ray.recipes import UnknownRecipe


def test_recipes_are_found_by_name():
    assert "quickstart" in recipes.names()
    for name in recipes.names():
        assert load_config(recipes.find(name)).name == name


@pytest.mark.parametrize("name", ["quickstar", "../secrets", "quickstart.yaml", ""])
def test_an_unknown_recipe_is_refused_with_the_known_ones(name):
    with pytest.raises(UnknownRecipe, match="there is no recipe .*choose one of .*quickstart"):
        recipes.find(name)


@pytest.mark.parametrize("command", [["quickstart"], ["run", "recipe:quickstart"]], ids=" ".join)
def test_the_quickstart_needs_no_file(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, [*command, "ppo.steps=3", "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "name: quickstart" in result.output and "steps: 3" in result.output and "actors" in result.output
    assert not list(tmp_path.iterdir())
