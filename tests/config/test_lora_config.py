"""Adapters in a config: where they are refused, and which roles they start."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_ray.config import ConfigError, RunConfig, parse_config


def config(ppo: dict[str, Any], **sections: Any) -> RunConfig:
    return parse_config(
        {
            "name": "adapters",
            "model": {"build": {"hidden_size": 64, "heads": 2, "kv_heads": 1}},
            "data": {"simulate": {}, "max_prompt_tokens": 200, "max_dialogue_tokens": 400},
            "ppo": ppo,
        }
        | sections
    )


ADAPTERS = {"lora": {"rank": 8, "alpha": 16}}
REFUSED = {
    "value model": ({"value": ADAPTERS}, "adapters are for the policy; the value model trains all weights"),
    "no base to share": ({"share_reference": True}, "share_reference: without policy.lora"),
    "nothing to send": ({"rollout": {"weights": {"lora": "adapter"}}}, "set policy.lora, or use merged"),
    "another channel": (
        {"policy": ADAPTERS, "rollout": {"weights": {"lora": "adapter", "kind": "nccl"}}},
        "lora: adapter needs kind object_store, and kind is nccl",
    ),
    "dropout": (
        {"policy": {"lora": {"dropout": 0.1}}},
        "ppo.policy.lora.dropout: Input should be less than or equal to 0",
    ),
    "no targets": ({"policy": {"lora": {"target_modules": []}}}, "target_modules is empty"),
    "rank": ({"policy": {"lora": {"rank": 513}}}, "ppo.policy.lora.rank: Input should be less than or equal to 512"),
    "unknown key": ({"policy": {"lora": {"r": 8}}}, "ppo.policy.lora.r: unknown key"),
    "eager packs": ({"policy": {"attention": "eager"}}, "set packing: false, or use sdpa"),
    "eager packs, reference": ({"reference": {"attention": "eager"}}, "set packing: false, or use sdpa"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    ppo, message = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        config(ppo)
    assert message in str(caught.value)


def test_reward_models_train_all_weights():
    with pytest.raises(ConfigError, match="a reward model trains all weights"):
        config({}, reward_model={"learner": ADAPTERS})


def test_a_shared_reference_starts_no_workers():
    assert "reference" in config({"policy": ADAPTERS}).roles
    assert "reference" not in config({"policy": ADAPTERS, "share_reference": True}).roles


def test_supervised_fine_tuning_takes_adapters_too():
    assert config({}, sft={"learner": ADAPTERS}).sft.learner.lora.rank == 8


def test_eager_attention_pads():
    assert not config({"policy": {"attention": "eager", "packing": False}}).ppo.policy.packing
