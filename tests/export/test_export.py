"""An exported model: a folder that loads anywhere, and a card that names its limits."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from rlhf_ray.algorithms.reward_quality import measure_quality
from rlhf_ray.cli import app
from rlhf_ray.export.folder import ExportError, export
from rlhf_ray.runs.run_folder import RunFolder

EVALUATION = {
    "win_rate_vs_sft": 0.75, "win_rate_interval": [0.7, 0.8], "prompts": 300, "kl_sequence": 3.25,
    "utility": {"base": -1.0, "sft": 2.0, "ppo": 4.5}, "reward": {"base": None, "sft": 0.0, "ppo": 1.5},
    "length": {"base": 50.0, "sft": 20.0, "ppo": 40.0},
}  # fmt: skip
CONFIG = "name: ours\nstages: [sft, ppo]\nmodel: {path: org/base}\ndata: {demonstrations: {location: demos.jsonl}}\n"


@pytest.fixture
def run(tmp_path, tiny_model) -> RunFolder:
    """A run's folder whose policy is the tiny model."""
    folder = RunFolder(tmp_path / "runs" / "ours")
    folder.path.mkdir(parents=True)
    shutil.copytree(tiny_model, folder.policy)
    (folder.policy / "fit.json").write_text("{}")
    folder.config.write_text(CONFIG)
    folder.evaluation.write_text(json.dumps(EVALUATION))
    return folder


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def test_a_policy_is_exported_with_its_card(run, tmp_path):
    result = CliRunner().invoke(app, ["export", str(run.path), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    assert AutoModelForCausalLM.from_pretrained(out).config.vocab_size == 300
    assert not (out / "fit.json").exists() and json.loads((out / "evaluation.json").read_text()) == EVALUATION
    card = card_of(out)
    assert (card.data.base_model, card.data.library_name) == ("org/base", "transformers")
    assert (
        "| hidden utility | -1.00 | 2.00 | 4.50 |" in card.text and "| learned reward | – | 0.00 | 1.50 |" in card.text
    )
    assert (
        "in 75.0 % (70.0–80.0)" in card.text and "3.25 nats" in card.text and "demonstrations: demos.jsonl" in card.text
    )
    assert "judged by a utility function, not by people" in card.text
    assert "2.0 times as long as before; the reward may favour length" in card.text


def test_the_card_names_what_was_not_measured(run, tmp_path):
    judged = EVALUATION | {"win_rate_vs_sft": None, "utility": dict.fromkeys(("base", "sft", "ppo"))}
    run.evaluation.write_text(json.dumps(judged))
    text = card_of(export(run, "policy", tmp_path / "judged")).text
    assert "evaluated only by the reward that it was trained on" in text and "hidden utility" not in text
    run.evaluation.unlink()
    assert "It was not evaluated." in card_of(export(run, "policy", tmp_path / "unknown")).text


def test_the_card_warns_of_a_reward_model_that_may_only_measure_length(run, tmp_path):
    shutil.copytree(run.policy, run.reward_model)
    lengths = np.random.default_rng(0).integers(5, 50, 200)
    better, worse = np.arange(0, 200, 2), np.arange(1, 200, 2)
    quality = measure_quality(3.0 * lengths, lengths, better, worse, True, [None] * 100, [None] * 100)
    run.reward_quality.write_text(json.dumps(asdict(quality)))
    out = export(run, "reward_model", tmp_path / "rewards")
    text = card_of(out).text
    assert (
        "Choosing the longer response agrees on" in text
        and "may know no more than length" in text
        and "confidence is off by" in text
    )
    assert (out / "quality.json").is_file() and card_of(out).data.pipeline_tag == "text-classification"


def test_a_refused_export_writes_nothing(run, tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(ExportError, match="taken exists already"):
        export(run, "policy", tmp_path / "taken")
    with pytest.raises(ExportError, match="has no reward_model yet; it has policy"):
        export(run, "reward_model", tmp_path / "out")
    with pytest.raises(ExportError, match="not a run's folder"):
        export(RunFolder(tmp_path), "policy", tmp_path / "out")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["runs", "taken"]
