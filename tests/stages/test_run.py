"""A small run on the real engines: all stages, their results, and resuming after an interruption."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from rlhf_ray.config import RunConfig, parse_config
from rlhf_ray.driver.checkpointer import load_state
from rlhf_ray.models.reward_heads import normalised_on
from rlhf_ray.runs.atomic_checkpoint import NotACheckpoint
from rlhf_ray.runs.events import read_events
from rlhf_ray.runs.ledger import read_ledger
from rlhf_ray.runs.metrics import read_metrics
from rlhf_ray.runs.run_folder import RunFolder, RunFolderTaken
from rlhf_ray.stages.reward_model import HELD_OUT
from rlhf_ray.stages.run import run
from rlhf_ray.telemetry.names import find_metric

STEPS, BATCH = 4, 16
LEARNER = {"workers": {"threads": 1, "cpus": 0.1}, "optimizer": {"learning_rate": 1e-3}}


def config(folder: Path, **ppo: object) -> RunConfig:
    """Five roles and two policy ranks. All tests use the same seeds and sizes."""
    return parse_config(
        {
            "name": "small",
            "folder": str(folder),
            "model": {"build": {"vocab_size": 400, "hidden_size": 64, "layers": 2, "heads": 2, "kv_heads": 1}},
            "data": {
                "simulate": {"demonstrations": 150, "pairs": 60, "held_out_pairs": 20, "prompts": 40, "held_out_prompts": 8,
                             "rankings": 2, "scores": 2, "edits": 2},
                "max_prompt_tokens": 250,
                "max_dialogue_tokens": 400,
            },
            "sft": {"batch_size": 32, "learner": LEARNER},
            "reward_model": {"batch_size": 16, "learner": LEARNER, "members": 2},
            "ppo": {
                "steps": STEPS,
                "batch_size": BATCH,
                "minibatches": 2,
                "checkpoint": {"every": 2, "keep": 2},
                "rollout": {"workers": {"threads": 1, "cpus": 0.1}, "sampling": {"max_new_tokens": 16}},
                "policy": LEARNER | {"workers": {"count": 2, "threads": 1, "cpus": 0.1}, "sharding": {"zero_stage": 2}},
                "value": LEARNER,
                "reference": {"workers": {"threads": 1, "cpus": 0.1}},
                "reward": {
                    "workers": {"threads": 1, "cpus": 0.1},
                    "model": {"combine": "uncertainty", "normalise_on": 30},
                    "functions": [{"name": "utility", "function": "rlhf_ray.data.simulator:utility_reward", "weight": 0.1}],
                },
            }
            | ppo,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(ray_cluster, tmp_path_factory) -> RunFolder:
    return run(config(tmp_path_factory.mktemp("runs")))


def test_every_stage_leaves_its_model(finished):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    for folder in (finished.sft, finished.policy):
        assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == 400
    reward_model = AutoModelForSequenceClassification.from_pretrained(finished.reward_model)
    assert reward_model.config.num_labels == 1 and reward_model.config.reward_std > 0
    assert not weights_equal(finished.sft, finished.policy)


def test_an_ensemble_has_different_members_and_a_quality_of_its_own(finished):
    members = [finished.reward_member(1), finished.reward_member(2)]
    assert not weights_equal(*members)
    held_out = [json.loads((member / HELD_OUT).read_text()) for member in members]
    normalised = np.asarray([(np.asarray(s["rewards"]) - s["mean"]) / s["std"] for s in held_out])
    np.testing.assert_allclose([normalised.mean(axis=1), normalised.std(axis=1)], [[0, 0], [1, 1]], atol=1e-3)
    quality = json.loads(finished.reward_quality.read_text())
    assert quality["members"] == 2
    assert quality["disagreement"] == pytest.approx(normalised.std(axis=0).mean()) and quality["disagreement"] > 0
    for record in read_metrics(finished.metrics):
        assert record["reward/part/model_disagreement"] > 0


def test_rewards_are_normalised_on_the_policys_own_answers(finished):
    """Rewards are normalised before the first step: the first batch has mean and std near 0 and 1, and the folder is marked."""
    for member in (1, 2):
        assert normalised_on(finished.reward_member(member), None) == "30 answers of the policy that PPO started from"
    (event,) = [event for event in read_events(finished.events) if "normalised" in event.message]
    assert event.message.count("std") == 2
    first = read_metrics(finished.metrics)[0]
    bias = first["reward/part/model"] + first["reward/part/model_disagreement"]
    assert abs(bias) < 1.2, "mean of 16 other answers by the same policy, λ = 1 taken back"


@pytest.mark.parametrize("stage", ["sft", "reward_model", "reward_model_2", "ppo"])
def test_every_metric_is_in_the_catalogue(finished, stage):
    records = read_metrics(finished.stage_metrics(stage))
    names = {name for record in records for name in record} - {"step", "timestamp"}
    assert len(names) > 5 and {name for name in names if find_metric(name) is None} == set()


def test_metrics_of_every_step(finished):
    records = read_metrics(finished.metrics)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    for record in records:
        assert record["engine/logprob_difference_max"] < 1e-4
        assert record["staleness/max"] == 0
        assert 0 <= record["response/eos_rate"] <= 1
    assert records[0]["kl/sequence"] == pytest.approx(0, abs=1e-4), "the first batch comes from the reference itself"
    assert records[-1]["kl/sequence"] != 0


def test_every_rollout_is_trained_once(finished):
    entries = list(read_ledger(finished.path / "ledger.jsonl"))
    trained = [rollout for entry in entries for rollout in entry.trained]
    assert [entry.step for entry in entries] == list(range(1, STEPS + 1))
    assert len(trained) == len(set(trained)) == STEPS * BATCH


def test_evaluation_and_report(finished):
    result = json.loads(finished.evaluation.read_text())
    assert set(result["utility"]) == {"base", "sft", "ppo"} and None not in result["utility"].values()
    assert 0 <= result["win_rate_interval"][0] <= result["win_rate_vs_sft"] <= result["win_rate_interval"][1] <= 1
    assert 0.5 < result["reward_model_accuracy_ceiling"] <= 1 and 0 <= result["reward_model_accuracy"] <= 1
    assert set(result["seconds"]) == {"sft", "reward_model", "start", "normalisation", "ppo", "evaluation"}
    assert len(finished.evaluation_samples.read_text().splitlines()) == 8
    assert "small" in finished.report.read_text()


def test_a_second_run_of_the_name_is_refused(finished):
    with pytest.raises(RunFolderTaken, match="--resume"):
        run(config(finished.path.parent))


def interrupted_copy(finished: RunFolder, folder: Path) -> RunFolder:
    """The run as it was between step 2 and the next checkpoint: it has later metrics, but no later checkpoint and no policy."""
    copy = RunFolder(shutil.copytree(finished.path, folder / finished.name))
    shutil.rmtree(copy.policy)
    shutil.rmtree(copy.checkpoints / f"step_{STEPS}")
    (copy.checkpoints / "tmp_step_4").mkdir()
    return copy


def test_resume_is_bit_exact(finished, tmp_path):
    """From the checkpoint of step 2 the run gets the same weights, rollouts and metrics as without the interruption."""
    copy = interrupted_copy(finished, tmp_path)
    run(config(tmp_path), resume=True)
    assert weights_equal(finished.policy, copy.policy)
    assert list(read_ledger(copy.path / "ledger.jsonl")) == list(read_ledger(finished.path / "ledger.jsonl"))
    ours, theirs = (read_metrics(folder.metrics) for folder in (copy, finished))
    same = [key for key in theirs[0] if not key.startswith(("time", "throughput", "idle"))]
    assert [{key: record[key] for key in same} for record in ours] == [
        {key: record[key] for key in same} for record in theirs
    ]
    assert any("goes on after step 2" in event.message for event in read_events(copy.events))


def test_skipped_damaged_checkpoints_are_reported(finished, tmp_path):
    copy = interrupted_copy(finished, tmp_path)
    damaged = next((copy.checkpoints / "step_2" / "policy").glob("*.safetensors"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(NotACheckpoint, match="SHA-256"):
        load_state(copy.checkpoints / "step_2")
    with pytest.raises(NotACheckpoint, match="none of the 1 checkpoints"):
        run(config(tmp_path), resume=True)


def weights_equal(first: Path, second: Path) -> bool:
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (first, second))
    return ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)
