"""The named recipes are valid configs with the settings of their papers."""

from __future__ import annotations

import pytest

from tests.recipes import RECIPES, load_recipe

CHOICES = {
    "PPO": ("gae", "ppo", "token_mean", "reward"),
    "GRPO": ("grpo", "ppo", "sequence_mean", "loss"),
    "Dr. GRPO": ("dr_grpo", "ppo", "constant", "none"),
    "DAPO": ("grpo", "ppo", "token_mean", "none"),
    "RLOO": ("rloo", "ppo", "constant", "reward"),
    "REINFORCE++": ("reinforce_plus_plus", "ppo", "token_mean", "reward"),
    "GSPO": ("grpo", "gspo", "sequence_mean", "none"),
    "CISPO": ("grpo", "cispo", "token_mean", "none"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_loads_and_only_gae_has_a_value_model(name, tmp_path):
    config = load_recipe(name, tmp_path)
    assert ("value" in config.roles) == (config.ppo.algorithm.advantage == "gae")
    assert ("reference" in config.roles) == (config.ppo.algorithm.kl.placement != "none")


@pytest.mark.parametrize(("name", "choices"), CHOICES.items())
def test_recipes_are_what_their_papers_say(name, choices, tmp_path):
    algorithm = load_recipe(name, tmp_path).ppo.algorithm
    assert (algorithm.advantage, algorithm.policy_loss, algorithm.aggregation, algorithm.kl.placement) == choices
