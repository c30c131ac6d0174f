"""The figures of `evaluation.json`: win rates, intervals, and None for unknown figures."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from rlhf_ray.algorithms.statistics import wilson
from rlhf_ray.driver.answers import Answers
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.stages.evaluation import (
    accuracy_of_reward_model,
    summarise,
    write_samples,
)
from rlhf_ray.types import Prompt

NAN = math.nan


def answers(rewards: list[float], utilities: list[float] | None = None, kl: float | None = None) -> Answers:
    truth = None if utilities is None else np.asarray(utilities)
    texts = tuple(f"answer {i}" for i in range(len(rewards)))
    return Answers(texts, np.arange(1, 1 + len(rewards)), np.asarray(rewards), truth, kl)


def test_figures_when_everything_is_known():
    by_policy = {
        "base": answers([0.0, 0.0], [0.0, 1.0]),
        "sft": answers([1.0, 2.0], [2.0, 4.0]),
        "ppo": answers([2.0, 1.5], [3.0, 5.0], kl=4.2),
    }
    result = summarise(by_policy, 0.8, 0.9, {"sft": 3.0})
    assert result["win_rate_vs_sft"] == 1.0 and result["win_rate_vs_sft_by_reward"] == 0.5
    assert result["win_rate_interval"] == (wilson(2, 2).low, wilson(2, 2).high)
    assert result["utility"] == {"base": 0.5, "sft": 3.0, "ppo": 4.0} and result["utility_std_sft"] == 1.0
    assert result["reward"] == {"base": 0.0, "sft": 1.5, "ppo": 1.75}
    assert (result["kl_sequence"], result["prompts"], result["seconds"]) == (4.2, 2, {"sft": 3.0})
    assert (result["reward_model_accuracy"], result["reward_model_accuracy_ceiling"]) == (0.8, 0.9)


def test_unknown_figures_are_null_and_the_file_is_strict_json():
    by_policy = {"sft": answers([1.0, NAN]), "ppo": answers([NAN, NAN])}
    result = summarise(by_policy, None, None, {})
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["win_rate_vs_sft"] is result["win_rate_interval"] is result["win_rate_vs_sft_by_reward"] is None
    assert result["utility"] == {"base": None, "sft": None, "ppo": None}
    assert result["reward"] == {"sft": 1.0, "ppo": None} and result["kl_sequence"] is None
    assert summarise({"sft": by_policy["sft"]}, None, None, {})["win_rate_vs_sft_by_reward"] is None


def test_samples_hold_every_policys_answer(tmp_path):
    prompts = [Prompt(f"p{i}", np.zeros(1, np.int32), ({"role": "user", "content": f"Größe {i}?"},)) for i in range(2)]
    write_samples(
        tmp_path / "samples.jsonl", prompts, {"sft": answers([1.0, NAN]), "ppo": answers([2.0, 3.0], [5.0, 6.0])}
    )
    first, second = (json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines())
    assert first == {
        "prompt": [{"role": "user", "content": "Größe 0?"}],
        "answers": {"sft": "answer 0", "ppo": "answer 0"},
        "rewards": {"sft": 1.0, "ppo": 2.0},
        "utility": {"ppo": 5.0},
    }
    assert second["rewards"] == {"sft": None, "ppo": 3.0}


@pytest.mark.parametrize("accuracy", [0.75, 0.0])
def test_the_accuracy_is_the_last_measured_one(tmp_path, accuracy):
    folder = RunFolder(tmp_path)
    assert accuracy_of_reward_model(folder, None) == (None, None)
    path = folder.stage_metrics("reward_model")
    path.parent.mkdir()
    records = [
        {"step": 1, "heldout/accuracy": 0.6},
        {"step": 2, "heldout/accuracy": accuracy},
        {"step": 3, "loss": 1.0},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert accuracy_of_reward_model(folder, None) == (accuracy, None)
