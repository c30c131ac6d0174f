"""The facts in the entries of the registry, and a user's own entries by `package.module:name`."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from rlhf_ray.algorithms.advantages import EstimatorInput, grpo
from rlhf_ray.algorithms.losses import Clip, PolicyTokens, ppo_policy_loss
from rlhf_ray.algorithms.registry import ESTIMATORS, POLICY_LOSSES, estimator_named, policy_loss_named
from rlhf_ray.algorithms.statistics import Segments
from rlhf_ray.config import ConfigError, parse_config
from rlhf_ray.config.algorithm import AlgorithmConfig
from tests.learner.test_policy_objective import loss_and_gradient, minibatch

MASK = torch.ones(2, 3, dtype=torch.bool)
OWN = """
    from dataclasses import replace

    from rlhf_ray.algorithms.advantages import Advantages, grpo
    from rlhf_ray.algorithms.losses import ppo_policy_loss
    from rlhf_ray.algorithms.registry import AdvantageEstimator, PolicyLossKind

    def compute(batch):
        return Advantages(2 * grpo(batch.scores, batch.groups).unsqueeze(1) * batch.mask, returns=None)

    def half(tokens, clip):
        loss = ppo_policy_loss(tokens.logprobs, tokens.old_logprobs, tokens.advantages, tokens.mask)
        return replace(loss, loss=loss.loss / 2)

    twice = AdvantageEstimator(compute, needs_groups=True, per_response=True, allows_kl_in_reward=False)
    with_critic = AdvantageEstimator(compute, needs_critic=True)
    half_ppo = PolicyLossKind(half, needs_response_advantages=True)
"""
SAMPLE = {
    "name": "sample",
    "model": {"build": {"hidden_size": 64, "heads": 2, "kv_heads": 1}},
    "data": {"simulate": {}, "max_prompt_tokens": 200, "max_dialogue_tokens": 400},
}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The module `own_algorithms`, importable in this test."""
    (tmp_path / "own_algorithms.py").write_text(textwrap.dedent(OWN))
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_algorithms"
    sys.modules.pop("own_algorithms", None)


def having(table, fact: str) -> set[str]:
    return {name for name, entry in table.items() if getattr(entry, fact)}


def test_the_facts_of_estimators() -> None:
    by_response = {"rloo", "grpo", "dr_grpo"}
    assert having(ESTIMATORS, "needs_critic") == {"gae"} == having(ESTIMATORS, "whitens")
    assert having(ESTIMATORS, "per_response") == by_response
    assert having(ESTIMATORS, "needs_groups") == by_response | {"reinforce_plus_plus_baseline"}
    assert set(ESTIMATORS) - having(ESTIMATORS, "allows_kl_in_reward") == {"grpo", "dr_grpo"}
    assert set(ESTIMATORS) - having(ESTIMATORS, "reads_rewards") == {"none"}


def test_the_facts_of_policy_losses() -> None:
    assert having(POLICY_LOSSES, "has_dual_clip") == {"ppo", "decoupled_ppo"}
    assert having(POLICY_LOSSES, "of_sequences") == {"gspo", "gspo_token"}
    assert having(POLICY_LOSSES, "needs_response_advantages") == {"gspo"}
    assert having(POLICY_LOSSES, "corrects_rollout_policy") == {"decoupled_ppo"}


def test_reading_a_config_imports_no_torch() -> None:
    script = "import sys; from rlhf_ray.config import parse_config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown advantage estimator 'ppo'; allowed: gae, rloo, grpo, dr_grpo, "):
        estimator_named("ppo")
    with pytest.raises(
        ValueError, match="allowed: ppo, decoupled_ppo, cispo, gspo, gspo_token, or package.module:name"
    ):
        policy_loss_named("trpo")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:f", "cannot import 'no_such_module'"),
        ("own_algorithms:absent", "module 'own_algorithms' has no 'absent'"),
        (
            "own_algorithms:compute",
            "is a function; expected an object of rlhf_ray.algorithms.registry.AdvantageEstimator",
        ),
        (
            "own_algorithms:half_ppo",
            "is a PolicyLossKind; expected an object of rlhf_ray.algorithms.registry.AdvantageEstimator",
        ),
        ("own_algorithms:", "unknown advantage estimator"),
    ],
)
def test_what_is_no_estimator_is_refused_in_the_config(own, name, message) -> None:
    with pytest.raises(ConfigError, match="ppo.algorithm.advantage: ") as caught:
        parse_config(SAMPLE | {"ppo": {"algorithm": {"advantage": name}}})
    assert message in str(caught.value)


def test_an_estimator_of_ones_own_is_computed_and_its_facts_are_checked(own) -> None:
    algorithm = AlgorithmConfig.model_validate({"advantage": f"{own}:twice", "kl": {"placement": "none"}})
    scores, groups = torch.tensor([1.0, 2.0]), torch.tensor([0, 0])
    inputs = EstimatorInput(torch.zeros(2, 3), MASK, scores, groups)
    expected = 2 * grpo(scores, groups).unsqueeze(1).expand(2, 3)
    assert torch.equal(algorithm.estimator.compute(inputs).advantages, expected)
    assert algorithm.needs_groups and not algorithm.needs_value_model
    with pytest.raises(ValueError, match=f"advantage {own}:twice compares whole responses"):
        AlgorithmConfig.model_validate({"advantage": f"{own}:twice"})
    with pytest.raises(ConfigError, match="set samples_per_prompt to 2 or more"):
        parse_config(SAMPLE | {"ppo": {"algorithm": algorithm.model_dump()}})


def test_an_estimator_of_ones_own_may_train_a_value_model(own) -> None:
    config = parse_config(SAMPLE | {"ppo": {"algorithm": {"advantage": f"{own}:with_critic"}}})
    assert "value" in config.roles


def test_a_policy_loss_of_ones_own_is_computed_and_its_facts_are_checked(own) -> None:
    algorithm = AlgorithmConfig.model_validate({"policy_loss": f"{own}:half_ppo", "advantage": "rloo"})
    logprobs, old, advantages = torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(0))
    tokens = PolicyTokens(logprobs, old, old, advantages, MASK, Segments.rows(MASK))
    loss = algorithm.loss_kind.compute(tokens, Clip(0.2, 0.2)).loss
    assert torch.equal(loss, ppo_policy_loss(logprobs, old, advantages, MASK).loss / 2)
    with pytest.raises(ValueError, match="needs one advantage per response, and advantage gae gives one per token"):
        AlgorithmConfig.model_validate({"policy_loss": f"{own}:half_ppo"})
    with pytest.raises(ValueError, match="dual_clip bounds the surrogate of ppo, decoupled_ppo"):
        AlgorithmConfig.model_validate({"policy_loss": f"{own}:half_ppo", "advantage": "rloo", "dual_clip": 3.0})


def test_the_learners_objective_uses_a_policy_loss_of_ones_own(own) -> None:
    batch = minibatch(seed=0, counts=[3, 2], aggregation="token_mean")
    settings = {"advantage": "rloo", "kl": {"placement": "none"}}
    built_in = loss_and_gradient([batch], AlgorithmConfig.model_validate(settings))
    halved = loss_and_gradient([batch], AlgorithmConfig.model_validate(settings | {"policy_loss": f"{own}:half_ppo"}))
    assert halved[0] == pytest.approx(built_in[0] / 2)
    assert halved[1] == pytest.approx(built_in[1] / 2)


def test_a_ray_worker_finds_entries_of_ones_own(own, tmp_path, ray_cluster) -> None:
    import ray

    algorithm = AlgorithmConfig.model_validate({"policy_loss": f"{own}:half_ppo", "advantage": "rloo"})

    @ray.remote(num_cpus=0, runtime_env={"env_vars": {"PYTHONPATH": f"{tmp_path}:{Path.cwd()}"}})
    def facts(received: AlgorithmConfig) -> tuple[bool, bool]:
        return received.loss_kind.needs_response_advantages, received.loss_kind.has_dual_clip

    assert ray.get(facts.remote(algorithm), timeout=120) == (True, False)
