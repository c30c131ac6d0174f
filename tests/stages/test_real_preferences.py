"""A small version of the recipe for hh-rlhf: transcripts, three stages, no critic. It uses the real file if there is one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_ray.config import load_config
from rlhf_ray.runs.metrics import read_metrics
from rlhf_ray.stages.run import run

ROOT = Path(__file__).parents[2]
REAL = ROOT.parent / "shared" / "data" / "hh-rlhf-harmless" / "pairs.jsonl"


@pytest.fixture
def transcripts(tmp_path) -> Path:
    """The real transcripts, or similar ones."""
    if REAL.is_file():
        return REAL
    path = tmp_path / "pairs.jsonl"
    lines = []
    for number in range(120):
        question = (
            f"\n\nHuman: What is {number} plus one?\n\nAssistant: Let me think.\n\nHuman: Please do.\n\nAssistant: "
        )
        lines.append(json.dumps({"chosen": f"{question}It is {number + 1}.", "rejected": f"{question}I do not care."}))
    path.write_text("\n".join(lines) + "\n")
    return path


def test_recipe_for_human_preferences(ray_cluster, transcripts, tmp_path):
    source = f"{{location: {json.dumps(str(transcripts))}, format: hh, limit: 120}}"
    config = load_config(
        ROOT / "configs" / "hh-harmless-cpu.yaml",
        [
            f"folder={json.dumps(str(tmp_path))}",
            f"data.demonstrations={source}", f"data.pairs={source}", f"data.prompts={source}",
            "model.build.layers=2", "model.build.vocab_size=600", "model.build.hidden_size=64", "model.build.heads=2",
            "ppo.steps=2", "ppo.batch_size=8", "ppo.samples_per_prompt=2", "ppo.minibatches=1",
            "ppo.rollout.sampling.max_new_tokens=12", "evaluation.prompts=4",
            "ppo.algorithm={advantage: rloo, aggregation: sequence_mean, kl: {placement: loss, estimator: k2}}",
        ],
    )  # fmt: skip
    folder = run(config)
    before, first, *_ = read_metrics(folder.stage_metrics("reward_model"))
    for loss in (before["heldout/loss"], first["loss"]):
        assert loss == pytest.approx(0.6931, abs=0.003), "a fresh head knows nothing: log 2"
    records = read_metrics(folder.metrics)
    assert [record["step"] for record in records] == [1, 2]
    assert "value/loss" not in records[0] and records[0]["policy/clip_fraction"] == 0
    assert records[0]["policy/ratio_max"] == pytest.approx(1.0), "a single optimizer step starts at ratio 1"
    result = json.loads(folder.evaluation.read_text())
    assert result["win_rate_vs_sft"] is None and result["utility"]["ppo"] is None, "real data has no utility"
    assert 0 <= result["win_rate_vs_sft_by_reward"] <= 1
    assert len(folder.evaluation_samples.read_text().splitlines()) == 4
