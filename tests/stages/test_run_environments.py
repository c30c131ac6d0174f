"""The recipes with environments, cut down: supervised training on dialogues, then PPO on episodes of several turns."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from rlhf_ray.config import load_config
from rlhf_ray.runs.metrics import read_metrics
from rlhf_ray.stages.run import run

CONFIGS = Path(__file__).parents[2] / "configs"


def test_the_recipe_has_the_problems_that_its_script_writes(tmp_path):
    runpy.run_path(str(CONFIGS / "data" / "calculator.py"))["write"](tmp_path)
    written = sorted(tmp_path.iterdir())
    assert len(written) == 2
    for path in written:
        assert path.read_bytes() == (CONFIGS / "data" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("calculator-cpu", ["data.demonstrations.limit=120", "ppo.algorithm={advantage: rloo}", "ppo.samples_per_prompt=4"]),
        (
            "customer-service-dialogue-cpu",
            ["data.simulate.demonstrations=120", "data.simulate.prompts=60", "data.simulate.held_out_prompts=6"],
        ),
    ],
)  # fmt: skip
def test_recipe(ray_cluster, tmp_path, monkeypatch, recipe, overrides):
    monkeypatch.chdir(CONFIGS.parent)
    config = load_config(
        CONFIGS / f"{recipe}.yaml",
        [
            f"folder={json.dumps(str(tmp_path))}", "sft.epochs=1", "ppo.steps=2", "ppo.batch_size=16", "ppo.minibatches=2",
            "sft.evaluate_every=40", "sft.learner.workers.count=1", "evaluation.prompts=4", *overrides,
        ],
    )  # fmt: skip
    folder = run(config)
    records = read_metrics(folder.metrics)
    assert [record["step"] for record in records] == [1, 2]
    for record in records:
        assert record["engine/logprob_difference_max"] < 1e-4, (
            "the learner reads what the engine was given, turn by turn"
        )
        assert 1 <= record["response/turns_mean"] <= 3
        assert "reward/part/environment" in record
    samples = [json.loads(line) for line in folder.samples.read_text().splitlines()]
    assert all(set(sample["reward_parts"]) == {"environment"} for sample in samples)
    assert json.loads(folder.evaluation.read_text())["reward"]["ppo"] is not None
