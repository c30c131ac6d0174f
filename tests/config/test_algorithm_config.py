"""Combinations of algorithms that are undefined or have no effect are refused with a reason and a remedy."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from rlhf_ray.config import ConfigError, parse_config
from rlhf_ray.config.algorithm import AlgorithmConfig

LOSS, NONE = {"kl": {"placement": "loss"}}, {"kl": {"placement": "none"}}
GSPO = NONE | {"advantage": "grpo", "policy_loss": "gspo", "aggregation": "sequence_mean"}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "k1 as a loss": ({"kl": {"placement": "loss", "estimator": "k1"}}, "expected gradient of zero"),
    "k2 weighted": ({"kl": {"placement": "loss", "estimator": "k2", "importance_weighted": True}}, "would lose it"),
    "a weighted reward": ({"kl": {"importance_weighted": True}}, "a reward is not differentiated"),
    "GRPO with KL in the reward": ({"advantage": "grpo"}, "set kl.placement to loss or none"),
    "Dr. GRPO with KL in the reward": ({"advantage": "dr_grpo"}, "set kl.placement to loss or none"),
    "RLOO with a discount": ({"advantage": "rloo", "gamma": 0.9}, "takes a response as a whole"),
    "token whitening without tokens": (LOSS | {"advantage": "grpo", "whiten_rewards": True}, "a reward for length"),
    "dynamic sampling without groups": ({"dynamic_sampling": {}}, "finds signal without groups"),
    "REINFORCE++ has no groups either": (
        {"advantage": "reinforce_plus_plus", "dynamic_sampling": {}}, "finds signal without groups",
    ),
    "one attempt": (LOSS | {"advantage": "grpo", "dynamic_sampling": {"max_attempts": 1}}, "greater than or equal to 2"),
    "CISPO with dual clip": ({"policy_loss": "cispo", "dual_clip": 3.0}, "dual_clip bounds the surrogate of ppo"),
    "decoupled with a correction": ({"policy_loss": "decoupled_ppo", "correction": "truncate"}, "would do it again"),
    "GSPO by tokens": (GSPO | {"aggregation": "token_mean"}, "a mean over sequences"),
    "GSPO with GAE": (GSPO | {"advantage": "gae"}, "use gspo_token"),
    "GSPO with REINFORCE++": (GSPO | {"advantage": "reinforce_plus_plus"}, "use gspo_token"),
    "GSPO with TIS": (GSPO | {"correction": "truncate"}, "set correction_level to sequence"),
    "GSPO-token by tokens": ({"policy_loss": "gspo_token"}, "a mean over sequences"),
    "punished and left out": ({"filter_truncated": True, "missing_eos_penalty": 1.0}, "choose one"),
    "a negative bonus": ({"entropy_coefficient": -0.1}, "greater than or equal to 0"),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        AlgorithmConfig.model_validate(settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"advantage": "rloo"},
        {"advantage": "reinforce_plus_plus", "gamma": 0.99},
        {"advantage": "reinforce_plus_plus_baseline"},
        {"kl": {"estimator": "k3"}},
        {"kl": {"placement": "loss", "estimator": "k1", "importance_weighted": True}},
        {"policy_loss": "decoupled_ppo", "dual_clip": 3.0},
        {"policy_loss": "gspo_token", "aggregation": "sequence_mean"},
        GSPO | {"correction": "mask", "correction_level": "sequence"},
        {"filter_truncated": True, "overlong": {"buffer_tokens": 8}},
    ],
)
def test_accepted(settings):
    assert AlgorithmConfig.model_validate(settings)


def refusal(ppo: dict[str, Any], **rest: Any) -> str:
    sample = {
        "name": "sample",
        "model": {"build": {"hidden_size": 64, "heads": 2, "kv_heads": 1}},
        "data": {"simulate": {}, "max_prompt_tokens": 200, "max_dialogue_tokens": 400},
        "ppo": ppo,
    }
    with pytest.raises(ConfigError) as caught:
        parse_config(sample | rest)
    return str(caught.value)


@pytest.mark.parametrize("name", ["top_p", "top_k", "min_p"])
def test_sampling_from_a_part_of_the_distribution_is_refused_with_the_reason(name):
    message = refusal({"rollout": {"sampling": {name: 0.9}}})
    assert f"ppo.rollout.sampling: {name}: training samples from the whole distribution" in message


def test_the_engine_tells_log_probabilities_of_what_it_sampled_from():
    message = refusal({"rollout": {"engine": {"logprobs_mode": "raw_logprobs"}}})
    assert "engine.logprobs_mode must stay processed_logprobs" in message


def test_what_the_rest_of_the_config_must_allow():
    overlong = {"algorithm": {"overlong": {"buffer_tokens": 65}}}
    assert "buffer_tokens 65 is more than rollout.sampling.max_new_tokens 64" in refusal(overlong)
    ptx = {"algorithm": {"ptx": {}}}
    assert "which is 0.7; set it to 1" in refusal(ptx | {"rollout": {"sampling": {"temperature": 0.7}}})
    files = {kind: {"location": f"{kind}.jsonl"} for kind in ("pairs", "prompts")}
    rest = {"data": files, "stages": ["ppo"], "model": {"path": "policy"}}
    reward = {"reward": {"model": {"path": "reward"}}}
    assert "ppo.algorithm.ptx learns from data.demonstrations" in refusal(ptx | reward, **rest)


@pytest.mark.parametrize("advantage", ["rloo", "grpo", "dr_grpo", "reinforce_plus_plus_baseline"])
def test_a_group_of_one_is_refused(advantage):
    message = refusal({"algorithm": {"advantage": advantage} | LOSS})
    assert f"advantage {advantage} compares the responses to one prompt; set samples_per_prompt to 2 or more" in message
