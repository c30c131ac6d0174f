"""Runs that are refused before anything starts, although the config itself is valid."""

from __future__ import annotations

import re
from typing import Any

import pytest

from rlhf_ray.config import ConfigError, RunConfig, parse_config
from rlhf_ray.models.loading import NotAModel, load_reward_model, load_tokenizer
from rlhf_ray.models.reward_heads import RewardHeads, RewardModelMismatch
from rlhf_ray.models.tiny import build_tiny_model
from rlhf_ray.rewards.answers import ServiceError
from rlhf_ray.stages import checks


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    """Pretend that no Ray cluster is connected, as before a run starts its own."""
    monkeypatch.setattr(checks.ray, "is_initialized", lambda: False)


def config(model: object, ppo: dict[str, Any], **sections: Any) -> RunConfig:
    data = {"simulate": {}, "max_prompt_tokens": 60, "max_dialogue_tokens": 128}
    values = {"name": "x", "model": {"path": str(model)}, "data": data, "ppo": ppo}
    return parse_config(values | sections)


LIGHT = {role: {"workers": {"cpus": 0.01}} for role in ("policy", "value", "rollout", "reward", "reference")}


def refused(error: type[Exception], *arguments: Any, **sections: Any) -> str:
    with pytest.raises(error) as caught:
        checks.check_run(config(*arguments, **sections))
    return str(caught.value)


def test_a_run_that_can_start(tiny_model):
    checks.check_run(config(tiny_model, LIGHT | {"value_model": str(tiny_model)}))


@pytest.mark.parametrize("key", ["policy_model", "value_model"])
def test_folders_without_a_model_are_refused(tiny_model, tmp_path, key):
    message = refused(NotAModel, tiny_model, LIGHT | {key: str(tmp_path)})
    assert f"ppo.{key}: '{tmp_path}' has no config.json" in message
    assert "model.path" in refused(NotAModel, tmp_path / "absent", LIGHT)
    reward = LIGHT["reward"] | {"model": {"path": "./absent"}}
    assert "absent' is not a folder" in refused(NotAModel, tiny_model, LIGHT | {"reward": reward})


def test_missing_functions_are_refused(tiny_model):
    reward = LIGHT["reward"] | {"functions": [{"name": "f", "function": "math:no_such"}]}
    assert re.search(r"ppo\.reward\.functions: .*no_such", refused(ConfigError, tiny_model, LIGHT | {"reward": reward}))
    utility = {"utility": "no_such_module:f"}
    assert "evaluation.utility" in refused(ConfigError, tiny_model, LIGHT, evaluation=utility)


def test_more_resources_than_this_machine_has_are_refused(tiny_model):
    crowd = {"workers": {"count": 4, "cpus": 1000}}
    assert "stage ppo needs 4000.04 CPU in total" in refused(ConfigError, tiny_model, LIGHT | {"rollout": crowd})
    on_gpus = {"workers": {"cpus": 0.01, "count": 64, "gpus": 1}}
    message = refused(ConfigError, tiny_model, LIGHT, sft={"learner": on_gpus})
    assert "stage sft needs 64 GPU in total and this machine has" in message and "workers.gpus" in message
    pinned = {"workers": {"cpus": 0.1, "resources": {"rollout_node": 1}}}
    assert "1 rollout_node" in refused(ConfigError, tiny_model, LIGHT | {"rollout": pinned})


def test_stages_that_do_not_run_need_no_resources(tiny_model):
    crowd = {"workers": {"count": 4, "cpus": 1000}}
    checks.check_run(config(tiny_model, LIGHT, reward_model={"learner": crowd}, stages=["sft"]))


def test_resources_of_another_cluster_are_not_checked_on_this_machine(tiny_model):
    crowd = {"workers": {"count": 4, "cpus": 1000}}
    checks.check_run(config(tiny_model, LIGHT | {"rollout": crowd}, cluster={"address": "auto"}))


def test_sequences_longer_than_the_context_are_refused(tiny_model):
    data = {"simulate": {}, "max_prompt_tokens": 60, "max_dialogue_tokens": 129}
    assert "reads at most 128 tokens" in refused(ConfigError, tiny_model, LIGHT, data=data)


def test_models_with_different_tokenizers_are_refused(tiny_model, tmp_path):
    """A reward model with another vocabulary would misread the policy's token ids."""
    other = tmp_path / "other"
    build_tiny_model(other, ["other words entirely, for another tokenizer"] * 20, vocab_size=310, hidden_size=64, layers=1,
                     heads=2, kv_heads=1, max_positions=128)  # fmt: skip
    reward = LIGHT["reward"] | {"model": {"path": str(other)}}
    assert "token ids would not match" in refused(NotAModel, tiny_model, LIGHT | {"reward": reward})


def test_reward_models_without_the_configured_reading_are_refused(tiny_model, tmp_path):
    reward = LIGHT["reward"] | {"model": {"path": str(tiny_model)}}
    message = refused(RewardModelMismatch, tiny_model, LIGHT | {"reward": reward})
    assert "holds a LlamaForCausalLM, which has no reward" in message
    model = load_reward_model(tiny_model, RewardHeads({"reward": 1.0}, ("cooks",)))
    model.config.id2label = {0: "reward", 1: "group:cooks"}
    model.save_pretrained(tmp_path / "groups")
    load_tokenizer(tiny_model).save_pretrained(tmp_path / "groups")
    reward = LIGHT["reward"] | {"model": {"path": str(tmp_path / "groups"), "group": "guests"}}
    assert "it has cooks, mean" in refused(RewardModelMismatch, tiny_model, LIGHT | {"reward": reward})
    reward["model"]["group"] = "cooks"
    checks.check_run(config(tiny_model, LIGHT | {"reward": reward}))


def test_a_name_that_is_neither_a_folder_nor_a_hub_model_is_refused(tiny_model, monkeypatch):
    """A path with one slash looks like a hub name. Offline it must be refused at once, not after hours."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "is not a folder on this machine" in refused(NotAModel, "runs/sftt", LIGHT)


ALONE = {"algorithm": {"advantage": "none", "kl": {"placement": "none"}}, "samples_per_prompt": 2}


def test_a_teacher_with_another_tokenizer_is_refused(tiny_model, tiny_teacher, tmp_path):
    teacher = {"workers": {"cpus": 0.01}}
    alone = LIGHT | ALONE | {"reward": {"model": None}}
    checks.check_run(config(tiny_model, alone | {"teacher": teacher | {"model": str(tiny_teacher)}}))
    shape = {"hidden_size": 64, "layers": 1, "heads": 2, "kv_heads": 1, "max_positions": 128}
    build_tiny_model(tmp_path / "other", ["Quite another text."] * 20, vocab_size=310, **shape)
    refusal = refused(NotAModel, tiny_model, alone | {"teacher": teacher | {"model": str(tmp_path / "other")}})
    assert "ppo.teacher.model: the tokenizer of" in refusal
    absent = alone | {"teacher": teacher | {"model": str(tmp_path / "absent")}}
    assert "ppo.teacher.model" in refused(NotAModel, tiny_model, absent)


def test_judges_without_a_key_or_with_a_broken_template_are_refused(tiny_model, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    judge = {"url": "http://judge/v1", "model": "m"}

    def asking(**settings: Any) -> dict[str, Any]:
        reward = LIGHT["reward"] | {"judges": [judge | settings]}
        return LIGHT | {"samples_per_prompt": 2, "reward": reward}

    message = refused(ServiceError, tiny_model, asking(api_key_env="NO_SUCH_KEY"))
    assert "'judge' needs the key" in message and "NO_SUCH_KEY is not set" in message
    assert "the template of judge 'judge' cannot be read" in refused(ServiceError, tiny_model, asking(template="{{ a"))
    monkeypatch.setenv("NO_SUCH_KEY", "x")
    checks.check_run(config(tiny_model, asking(api_key_env="NO_SUCH_KEY")))
