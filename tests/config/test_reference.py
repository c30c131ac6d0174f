"""The documentation that is generated from the config's models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from rlhf_ray.config import ConfigError
from rlhf_ray.config.loading import read_values
from rlhf_ray.config.reference import config_reference, config_schema, describe_key
from rlhf_ray.config.run import RunConfig

RECIPES = sorted(Path("configs").glob("*.yaml"))


def properties(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for definition in [schema, *schema["$defs"].values()]:
        for name, node in definition.get("properties", {}).items():
            yield f"{definition['title']}.{name}", node


def test_the_schema_describes_every_key_and_section():
    schema = config_schema()
    assert [name for name, node in properties(schema) if not node.get("description")] == []
    assert [name for name, section in schema["$defs"].items() if not section.get("description")] == []
    assert set(schema["properties"]) == set(RunConfig.model_fields)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_schema_accepts_the_recipes(recipe):
    errors = jsonschema.Draft202012Validator(config_schema()).iter_errors(read_values(recipe))
    assert [error.message for error in errors] == []


def test_the_schema_refuses_what_the_models_refuse():
    validator = jsonschema.Draft202012Validator(config_schema())
    config = {"name": "sample", "model": {"path": "folder"}, "data": {}}
    assert validator.is_valid(config)
    for wrong in ({"ppo": {"batchsize": 64}}, {"ppo": {"steps": 0}}, {"ppo": {"algorithm": {"advantage": "vtrace"}}}):
        assert not validator.is_valid(config | wrong)


def test_a_key_has_its_type_default_and_documentation():
    text = describe_key("ppo.algorithm.kl.coefficient")
    assert text.splitlines()[0] == "ppo.algorithm.kl.coefficient: number, at least 0; default 0.05"
    assert "`" not in text and len(text.splitlines()) > 2


def test_a_section_lists_its_keys():
    text = describe_key("ppo.algorithm.kl")
    assert text.splitlines()[0] == "ppo.algorithm.kl: section"
    assert "  placement: one of reward, loss, none; default reward" in text.splitlines()
    assert "  ppo: section" in describe_key("").splitlines()
    assert "  name: text" in describe_key("")


@pytest.mark.parametrize(
    ("key", "first_line"),
    [
        ("ppo.reference.workers.cpus", "ppo.reference.workers.cpus: number, at least 0; default 0.125"),
        ("ppo.reward.judges.0.url", "ppo.reward.judges.url: text; required"),
        ("ppo.environment.class", "ppo.environment.class: package.module:name; required"),
        ("ppo.teacher", "ppo.teacher: section or null; default null"),
        (
            "stages",
            "stages: list of one of sft, reward_model, ppo, evaluation; default [sft, reward_model, ppo, evaluation]",
        ),
    ],
)
def test_defaults_are_those_of_the_place(key, first_line):
    assert describe_key(key).splitlines()[0] == first_line


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("kl.coefficient", "did you mean ppo.algorithm.kl.coefficient?"),
        ("ppo.batchsize", "did you mean ppo.batch_size"),
        ("ppo.steps.more", "did you mean ppo.steps"),
        ("zzz", "without a key lists the sections"),
    ],
)
def test_an_unknown_key_is_refused_with_the_closest_ones(key, hint):
    with pytest.raises(ConfigError, match=f"^{key}: unknown key; ") as caught:
        describe_key(key)
    assert hint in str(caught.value)


def test_the_reference_has_every_key_of_every_section_once():
    text = config_reference()
    for section in config_schema()["$defs"].values():
        assert section["description"] in text
    lines = text.splitlines()
    assert sum(line.startswith("- **`coefficient`**") for line in lines) == 3
    assert sum(line.startswith("- **`busy_wait`**") for line in lines) == 2  # a run's workers and an endpoint's


def test_links_of_the_reference_lead_to_headings():
    lines = config_reference().splitlines()
    anchors = {line.removeprefix("### ").strip("`").replace(".", "") for line in lines if line.startswith("### ")}
    targets = {part.split(")")[0] for line in lines for part in line.split("](#")[1:]}
    assert targets and targets <= anchors
