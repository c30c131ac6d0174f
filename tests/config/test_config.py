"""The strict config: refused values and their messages; files, overrides and dumps."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import ConfigError, RunConfig, dump_config, load_config, parse_config

SAMPLE: dict[str, Any] = {
    "name": "sample",
    "model": {"build": {"hidden_size": 64, "heads": 2, "kv_heads": 1}},
    "data": {"simulate": {}, "max_prompt_tokens": 200, "max_dialogue_tokens": 400},
}
FILES = {kind: {"location": f"{kind}.jsonl"} for kind in ("demonstrations", "pairs", "prompts")}


def sample(*changes: tuple[str, Any]) -> dict[str, Any]:
    """SAMPLE with values set by their dotted keys."""
    values = copy.deepcopy(SAMPLE)
    for key, value in changes:
        *sections, last = key.split(".")
        node = values
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    return values


def refusal(*changes: tuple[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(sample(*changes))
    return str(caught.value)


def accepted(*changes: tuple[str, Any]) -> RunConfig:
    return parse_config(sample(*changes))


def test_the_sample_is_valid_and_defaults_are_filled_in():
    config = accepted()
    assert config.ppo.batch_size == 64 and config.ppo.staleness == 0
    assert set(config.roles) == {"policy", "value", "rollout", "reward", "reference"}


REFUSED = {
    "unknown key, close": (("ppo.batchsize", 64), "ppo.batchsize: unknown key; did you mean 'batch_size'?"),
    "unknown key, deep": (("ppo.policy.optimizer.lr_", 1.0), "ppo.policy.optimizer.lr_: unknown key; allowed here: "),
    "unknown section": (("ppoo", {}), "ppoo: unknown key; did you mean 'ppo'?"),
    "text for a number": (("ppo.batch_size", "64"), "ppo.batch_size: Input should be a valid integer (got '64')"),
    "fraction for a count": (("ppo.steps", 1.5), "ppo.steps: Input should be a valid integer"),
    "number for a flag": (("ppo.algorithm.whiten_advantages", 1), "ppo.algorithm.whiten_advantages"),
    "choice": (("ppo.algorithm.advantage", "vtrace"), "reinforce_plus_plus_baseline, none, or package.module:name"),
    "staleness below zero": (("ppo.staleness", -1), "ppo.staleness: Input should be greater than or equal to 0 (got -1)"),
    "staleness above zero": (("ppo.staleness", 1), "ppo.staleness: Input should be less than or equal to 0 (got 1)"),
    "name that is a path": (("name", "../up"), "name: "),
    "stages in another order": (("stages", ["ppo", "sft"]), "each once and in this order"),
    "a stage twice": (("stages", ["sft", "sft"]), "each once and in this order"),
    "no stage": (("stages", []), "each once and in this order"),
    "an unknown stage": (("stages", ["dpo"]), "stages.0: "),
    "heads do not divide": (("model.build.heads", 3), "hidden_size 64 must be a multiple of heads 3"),
    "head size for vLLM": (("model.build.heads", 4), "hidden_size / heads is 16"),
    "model.path and build": (("model.path", "somewhere"), "exactly one of model.path"),
    "simulate and a source": (("data.pairs", FILES["pairs"]), "remove data.pairs or data.simulate"),
    "function without a colon": (("ppo.reward.functions", [{"name": "f", "function": "math.sqrt"}]), "package.module:name"),
    "function named model": (("ppo.reward.functions", [{"name": "model", "function": "math:sqrt"}]), "must differ"),
    "no reward at all": (("ppo.reward.model", None), "no source of reward"),
    "KL in a grouped reward": (("ppo.algorithm", {"advantage": "grpo"}), "set kl.placement to loss or none"),
    "a target without KL": (("ppo.algorithm.kl", {"placement": "none", "target": 3.0}), "kl.placement is none"),
    "a target for coefficient 0": (("ppo.algorithm.kl", {"target": 3.0, "coefficient": 0.0}), "kl.coefficient is 0"),
    "offload without shards": (("ppo.policy.sharding.offload_optimizer", True), "needs zero_stage 1, 2 or 3; it is 0"),
    "offload without GPU": (("ppo.policy.sharding", {"offload_optimizer": True, "zero_stage": 2}), "workers.gpus is 0"),
    "correction bounds reversed": (("ppo.algorithm.correction_bounds", [2.0, 0.5]), "correction_bounds must enclose 1"),
    "betas out of range": (("ppo.policy.optimizer.betas", [0.9, 1.0]), "betas"),
    "one GPU and a half": (("ppo.rollout.workers.gpus", 1.5), "use a whole number above 1"),
    "tensor parallel, one GPU": (("ppo.rollout", {"tensor_parallel": 2, "workers": {"gpus": 1}}), "set workers.gpus to the same"),
    "two GPUs, no tensor parallel": (("ppo.rollout.workers.gpus", 2), "tensor_parallel is 1 and workers.gpus is 2"),
    "a role colocated twice": (("ppo.placement.colocate", [["rollout", "policy"], ["policy", "value"]]), "named twice: policy"),
    "a role in its own group twice": (("ppo.placement.colocate", [["rollout", "rollout"]]), "named twice: rollout"),
    "an unknown role": (("ppo.placement.colocate", [["rollout", "critic"]]), "ppo.placement.colocate.0.1: "),
    "positions too few for a rollout": (("model.build.max_positions", 256), "below the longest sequence"),
    "sequences too short": (("ppo.rollout.max_sequence_tokens", 100), "is below data.max_prompt_tokens + max_new_tokens = 264"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(change, message):
    assert message in refusal(change)


def test_batches_divide_into_groups_and_minibatches():
    message = refusal(("ppo.batch_size", 30), ("ppo.samples_per_prompt", 4))
    assert "ppo: batch_size 30 is not divisible by its group, samples_per_prompt 4" in message
    assert "not divisible by minibatches 7" in refusal(("ppo.minibatches", 7))
    grouped = ("ppo.algorithm", {"advantage": "grpo", "kl": {"placement": "loss"}})
    assert "set samples_per_prompt to 2 or more" in refusal(grouped)
    assert "value" not in accepted(grouped, ("ppo.samples_per_prompt", 4)).roles


def test_combinations_that_are_possible():
    assert accepted(("ppo.rollout", {"tensor_parallel": 2, "workers": {"gpus": 2}})).ppo.rollout.workers.gpus == 2
    assert accepted(("ppo.rollout", {"workers": {"gpus": 0.5}}), ("ppo.placement.colocate", [["rollout", "policy"]]))
    without_kl = accepted(("ppo.algorithm.kl.placement", "none"))
    assert "reference" not in without_kl.roles


def test_colocated_roles_share_at_most_one_gpu_or_whole_ones():
    shared = ("ppo.placement.colocate", [["rollout", "policy", "value"]])
    by_role = [(f"ppo.{role}.workers", {"gpus": share}) for role, share in (("rollout", 0.7), ("policy", 0.7))]
    assert "ask for 1.4 GPUs in all (rollout 0.7, policy 0.7, value 0)" in refusal(shared, *by_role)
    assert accepted(shared, by_role[0], ("ppo.policy.workers", {"gpus": 0.3}))
    assert accepted(shared, ("ppo.rollout.workers", {"gpus": 1}), ("ppo.policy.workers", {"gpus": 1}))
    uneven = [("ppo.rollout.workers", {"count": 2, "gpus": 1}), ("ppo.policy.workers", {"gpus": 0.5})]
    assert "share bundle 0" in refusal(shared, *uneven, ("ppo.value.workers", {"gpus": 0.25}))
    second = refusal(shared, *uneven, ("ppo.value.workers", {"count": 2, "gpus": 0.5}))
    assert "bundle 1 ask for 1.5 GPUs in all (rollout 1, value 0.5)" in second


def test_every_stage_needs_its_source():
    for stage, kind in (("sft", "demonstrations"), ("reward_model", "pairs"), ("ppo", "prompts")):
        others = {name: source for name, source in FILES.items() if name != kind}
        assert f"stage {stage} reads data.{kind}" in refusal(("data", others))
    assert accepted(("data", FILES), ("model.build.max_positions", 1024)).data.pairs.location == "pairs.jsonl"


def test_stages_need_the_models_of_earlier_ones():
    assert "add the stage sft" in refusal(("stages", ["reward_model", "ppo"]))
    assert accepted(("stages", ["reward_model"]))
    assert "ppo.reward.model.path is not set" in refusal(("stages", ["sft", "ppo"]))
    assert accepted(("stages", ["sft", "ppo"]), ("ppo.reward.model.path", "elsewhere"))
    assert "ppo.reward.model.group is 'clerk', but the reward model of this run learns no groups" in refusal(
        ("ppo.reward.model.group", "clerk")
    )
    assert accepted(("ppo.reward.model.group", "clerk"), ("reward_model.groups", {}))
    assert "combine is min, but there is only one reward model" in refusal(("ppo.reward.model.combine", "min"))
    assert "at least one folder" in refusal(("ppo.reward.model.path", []))
    assert accepted(("ppo.reward.model.combine", "min"), ("reward_model.members", 2))
    assert accepted(("ppo.reward.model", {"combine": "min", "path": ["one", "other"]}))


def test_all_problems_are_reported_at_once():
    message = refusal(("ppo.batchsize", 1), ("seed", -1))
    assert "2 problem(s)" in message and "batchsize" in message and "seed" in message
    with pytest.raises(ConfigError, match="model: required and not set"):
        parse_config({"name": "x", "data": {"simulate": {}}})


def test_environment_values_are_in_no_message():
    assert "canary-1234" not in refusal(("ppo.rollout.workers.env", {"TOKEN": ["canary-1234"]}))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "sample.yaml"
    path.write_text(
        "name: sample\nmodel:\n  build: {hidden_size: 64, heads: 2, kv_heads: 1}\n"
        "data:\n  simulate: {}\n  max_prompt_tokens: 200\n  max_dialogue_tokens: 400\n"
        "ppo:\n  steps: 7\n  policy:\n    optimizer: {learning_rate: 3e-4}\n"
    )
    return path


def test_scientific_notation_is_a_number(file):
    assert load_config(file).ppo.policy.optimizer.learning_rate == 3e-4
    for text, value in (("1e-4", 1e-4), ("2E+0", 2.0), ("1.5e-3", 1.5e-3), (".5e-1", 0.05), ("1", 1.0)):
        assert (
            load_config(file, [f"sft.learner.optimizer.learning_rate={text}"]).sft.learner.optimizer.learning_rate
            == value
        )


def test_overrides_win_and_the_last_one_most(file):
    config = load_config(
        file, ["ppo.steps=8", "ppo.steps=9", "evaluation.prompts=4", "ppo.algorithm.kl={coefficient: 0.2}"]
    )
    assert (config.ppo.steps, config.evaluation.prompts, config.ppo.algorithm.kl.coefficient) == (9, 4, 0.2)
    assert load_config(file, ["name=other", "seed=3"]).seed == 3
    assert load_config(file, ["ppo.policy_model=a=b"]).ppo.policy_model == "a=b"
    assert load_config(file, ["ppo.policy_model=null"]).ppo.policy_model is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ppo.steps", "has the form section.key=value"),
        ("=3", "has the form section.key=value"),
        ("name.first=x", "name is 'sample', not a section"),
        ("ppo.stepz=3", "ppo.stepz: unknown key; did you mean 'steps'"),
        ("ppo.steps=many", "ppo.steps: Input should be a valid integer (got 'many')"),
        ("ppo.steps=[1,", "ppo.steps=[1,"),
    ],
)
def test_bad_overrides(file, override, message):
    with pytest.raises(ConfigError) as caught:
        load_config(file, [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"), [("- a\n", "expected a mapping"), ("a: [", "not valid YAML"), ("", "expected a mapping")]
)
def test_files_that_are_no_config(tmp_path, text, message):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)
    with pytest.raises(ConfigError, match="no such config file"):
        load_config(tmp_path / "absent.yaml")


def test_a_dump_reads_back_as_the_same_config(file, tmp_path):
    config = load_config(file, ["ppo.algorithm.correction=mask", "ppo.placement.colocate=[[rollout, policy]]"])
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config
    assert dump_config(load_config(again)) == dump_config(config)


def test_a_dump_has_the_names_of_environment_variables_but_not_their_values(file):
    roles = (
        "ppo.rollout",
        "ppo.reward",
        "ppo.reference",
        "ppo.policy",
        "ppo.value",
        "sft.learner",
        "reward_model.learner",
    )
    text = dump_config(load_config(file, [f"{role}.workers.env={{HF_TOKEN: canary-1234}}" for role in roles]))
    assert text.count("HF_TOKEN") == len(roles) and "canary" not in text
    assert "env: eager" in dump_config(load_config(file, ["ppo.rollout.engine={env: eager}"])), (
        "an engine's own setting"
    )
