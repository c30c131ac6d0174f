"""The discriminator in a config: its role, and settings that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rlhf_ray.cli import app
from rlhf_ray.config import ConfigError, RunConfig, parse_config

ALONE = {"reward": {"model": None}, "discriminator": {}}
FUNCTION = {"name": "discriminator", "function": "a:b"}


def config(data: dict[str, Any] | None = None, **ppo: Any) -> RunConfig:
    return parse_config(
        {"name": "a", "model": {"path": "m"}, "stages": ["ppo"], "data": data or {"simulate": {}}, "ppo": ppo}
    )


def test_it_is_a_role_of_its_own_and_reward_enough():
    assert set(config(**ALONE).roles) == {"policy", "rollout", "reference", "value", "discriminator"}
    both = config(reward={"model": None, "functions": [FUNCTION | {"name": "other"}]}, discriminator={})
    assert {"reward", "discriminator"} <= set(both.roles)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "adapters": ({"discriminator": {"lora": {}}}, "trains all weights"),
    "bounds upside down": ({"discriminator": {"trusted_accuracy": 0.8}}, "must be below sufficient_accuracy 0.8"),
    "more old samples than are kept": ({"discriminator": {"replay": {"share": 0.9}}}, "needs 9 old samples for each"),
    "a flipped label": ({"discriminator": {"smoothing": 0.5}}, "less than 0.5"),
    "uneven minibatches": ({"discriminator": {"minibatches": 5}}, "divisible by discriminator.minibatches 5"),
    "dynamic sampling": (
        {"samples_per_prompt": 4, "algorithm": {"advantage": "rloo", "dynamic_sampling": {}}}, "scores the whole batch later",
    ),
    "two of a name": ({"reward": {"model": None, "functions": [FUNCTION]}}, "rename it"),
    "an estimator without rewards": ({"algorithm": {"advantage": "none", "kl": {"placement": "none"}}, "teacher": {"model": "t"}},
                        "reads no reward"),
}  # fmt: skip


@pytest.mark.parametrize(("ppo", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(ppo, message):
    with pytest.raises(ConfigError, match=message):
        config(**ALONE | ppo)


def test_it_needs_demonstrations():
    with pytest.raises(ConfigError, match=r"ppo\.discriminator learns from data\.demonstrations"):
        config({"prompts": {"location": "prompts.jsonl"}}, **ALONE)


def test_dry_run_shows_where_it_runs():
    recipe = Path(__file__).parents[2] / "configs" / "adversarial-cpu.yaml"
    overrides = ["ppo.discriminator.workers={count: 2, cpus: 0.5}", "ppo.placement.colocate=[[policy, discriminator]]"]
    result = CliRunner().invoke(app, ["run", str(recipe), *overrides, "--dry-run"])
    assert result.exit_code == 0, (result.output, result.exception)
    assert "policy[0], discriminator[0]" in result.output and "discriminator[1]" in result.output
