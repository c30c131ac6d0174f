"""`rlhf-ray run --dry-run` prints the resolved config and the placement, and does nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlhf_ray.cli import app
from rlhf_ray.config import ConfigError, load_config

CONFIG = """
name: dry
model: {build: {hidden_size: 64, heads: 2, kv_heads: 1}}
data: {simulate: {}, max_prompt_tokens: 200, max_dialogue_tokens: 400}
ppo:
  rollout: {workers: {count: 2, gpus: 0.5, env: {HF_TOKEN: canary-1234}}}
  policy: {workers: {count: 2, gpus: 0.5}}
  placement: {colocate: [[rollout, policy]]}
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a config.yaml"
    path.write_text(CONFIG)
    return path


def test_it_prints_config_and_placement_and_touches_nothing(config):
    result = CliRunner().invoke(app, ["run", str(config), "ppo.steps=3", "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "steps: 3" in result.output and "canary" not in result.output
    for words in ("rollout[1], policy[1]", "1 GPU", "reference[0]", "7 actors"):
        assert words in result.output.replace("policy[1], rollout[1]", "rollout[1], policy[1]"), words
    assert [path.name for path in config.parent.iterdir()] == ["a config.yaml"]


def test_a_bad_config_is_refused_before_anything(config):
    result = CliRunner().invoke(app, ["run", str(config), "ppo.minibatches=5", "--dry-run"])
    assert isinstance(result.exception, ConfigError) and "minibatches 5" in str(result.exception)
    assert [path.name for path in config.parent.iterdir()] == ["a config.yaml"]


CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("recipe", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_resolves_without_its_gpus_and_network(recipe):
    result = CliRunner().invoke(app, ["run", str(recipe), "--dry-run"])
    assert result.exit_code == 0, (result.output, result.exception)
    assert f"name: {recipe.stem}" in result.output
    stages = load_config(recipe).stages
    assert ("actors" in result.output) == ("ppo" in stages)
    assert all(f"{stage}: " in result.output for stage in stages if stage in ("sft", "reward_model"))
