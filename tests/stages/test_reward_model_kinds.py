"""The real stage on the simulator's labels: one short training for each kind of feedback, and the folder that it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rlhf_ray.config import RunConfig, parse_config
from rlhf_ray.data.datasets import Datasets, Split
from rlhf_ray.data.labels import build_label_encoder, pack_examples
from rlhf_ray.data.limits import LengthLimit
from rlhf_ray.data.readers import Source, load
from rlhf_ray.data.records import Edit, Ranking, Scored
from rlhf_ray.data.simulator import Sizes, simulate
from rlhf_ray.models.heads import SequenceScores
from rlhf_ray.models.loading import load_scalar_model, load_tokenizer
from rlhf_ray.models.reward_heads import normalisation
from rlhf_ray.models.tiny import build_tiny_model
from rlhf_ray.rewards.model_reward import score_sequences
from rlhf_ray.runs.metrics import read_metrics
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.stages.reward_model import feedback, run_reward_model

SIZES = Sizes(
    demonstrations=8, pairs=60, held_out_pairs=16, rankings=40, scores=60, edits=20, prompts=4, held_out_prompts=4
)


def split(path: Path, record: Callable[[dict[str, Any]], Any], held_out: int = 10) -> Split:
    records = [record(json.loads(line)) for line in path.read_text().splitlines()]
    return Split(tuple(records[held_out:]), tuple(records[:held_out]))


def turn(text: str) -> tuple[dict[str, str], ...]:
    return ({"role": "assistant", "content": text},)


def ranking(row: dict[str, Any]) -> Ranking:
    ranks = {index: place for place, tied in enumerate(row["order"], start=1) for index in tied}
    places = tuple(ranks[index] for index in range(len(row["responses"])))
    return Ranking(tuple(row["prompt"]), tuple(map(turn, row["responses"])), places, group=row["group"])


def scored(row: dict[str, Any]) -> Scored:
    return Scored(tuple(row["prompt"]), turn(row["response"]), row["aspects"], group=row["group"])


def edit(row: dict[str, Any]) -> Edit:
    return Edit(tuple(row["prompt"]), turn(row["original"]), turn(row["edited"]), annotator=row["annotator"])


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Datasets:
    files = simulate(tmp_path_factory.mktemp("simulated") / "data", 0, SIZES)
    pairs = Split(load("pairs", Source(files.pairs)).records, load("pairs", Source(files.held_out_pairs)).records)
    return Datasets(
        None,
        pairs,
        None,
        rankings=split(files.rankings, ranking),
        scores=split(files.scores, scored),
        edits=split(files.edits, edit),
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory, data) -> Path:
    """A tiny model that reads enough tokens for the simulator's dialogues."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    texts = [turn["content"] for pair in data.pairs.train for turn in (*pair.prompt, *pair.chosen)]
    build_tiny_model(folder, texts, vocab_size=400, hidden_size=64, layers=2, heads=2, kv_heads=1, max_positions=384)
    return folder


def train(model: Path, data: Datasets, folder: Path, ranks: int = 1, **settings: Any) -> tuple[RunConfig, RunFolder]:
    learner = {"workers": {"count": ranks, "threads": 1, "cpus": 0.1}, "optimizer": {"learning_rate": 1e-3}}
    config = parse_config(
        {
            "name": "small",
            "folder": str(folder),
            "stages": ["reward_model"],
            "model": {"path": str(model)},
            "data": {"simulate": {}, "max_dialogue_tokens": 384},
            "reward_model": {"epochs": 3, "batch_size": 100, "learner": learner} | settings,
        }
    )
    run_folder = RunFolder(folder / "small")
    run_folder.path.mkdir()
    run_reward_model(config, run_folder, str(model), data, lambda message: None)
    return config, run_folder


def check_folder(config: RunConfig, folder: RunFolder, data: Datasets, labels: list[str], reading: str | None) -> None:
    """The result is a plain sequence-classification folder. Every reading is normalised on the held-out responses."""
    trained = AutoModelForSequenceClassification.from_pretrained(folder.reward_model)
    assert list(trained.config.id2label.values()) == labels
    assert trained(torch.arange(3, 12)[None]).logits.shape == (1, len(labels))
    assert trained.score.weight.abs().max(dim=1).values.min() > 1e-4, "every row has learned something"
    records = feedback(config.reward_model, data)
    encoder = build_label_encoder(config.reward_model, records.train)
    held_out = pack_examples(
        encoder.encode(load_tokenizer(folder.reward_model), records.held_out, LengthLimit(384)).items
    )
    for asked in (None, reading):
        joined = load_scalar_model(folder.reward_model, reading=asked)
        mean, std = normalisation(joined.config)
        scores = (score_sequences(SequenceScores(joined), held_out, 8192, torch.device("cpu")) - mean) / std
        assert (scores.mean(), scores.std()) == pytest.approx((0.0, 1.0), abs=1e-3)


def test_pairs_and_edits_with_groups_and_reliability_on_two_ranks(ray_cluster, model, data, tmp_path):
    settings = {"groups": {"minimum_labels": 15}, "reliability": {"strength": 5.0}}
    config, folder = train(model, data, tmp_path, ranks=2, **settings)
    records = read_metrics(folder.stage_metrics("reward_model"))
    assert records[1]["loss"] == pytest.approx(np.log(2), abs=0.002)
    assert records[-1]["loss"] < records[1]["loss"] and 0 <= records[-1]["heldout/accuracy"] <= 1
    groups = sorted({pair.group for pair in data.pairs.train})
    counts = {group: sum(pair.group == group for pair in data.pairs.train) for group in groups}
    fitted = [group for group in groups if counts[group] >= 15]
    assert 0 < len(fitted) < len(groups), "the draw has a group with too few labels"
    check_folder(config, folder, data, ["reward", *(f"group:{group}" for group in fitted)], fitted[0])
    believed = json.loads((folder.reward_model / "config.json").read_text())["annotator_reliability"]
    people = {r.annotator for r in (*data.pairs.train, *data.edits.train)}
    assert believed.keys() == people and all(0 < eta < 1 for eta in believed.values())
    assert len(set(believed.values())) > 1
    # The quality is that of the saved model, the best one, whose accuracy is in the metrics.
    best = json.loads((folder.reward_model / "fit.json").read_text())["best_step"]
    accuracy = next(record["heldout/accuracy"] for record in records if record["step"] == best)
    quality = json.loads(folder.reward_quality.read_text())
    assert 0 < quality["accuracy"]["low"] < quality["accuracy"]["value"] < quality["accuracy"]["high"] < 1
    assert abs(quality["accuracy"]["value"] - accuracy) < 0.2, "r_0 and the groups' rewards order about alike"


def test_rankings(ray_cluster, model, data, tmp_path):
    config, folder = train(model, data, tmp_path, kind="rankings", ranking_loss="plackett_luce")
    records = read_metrics(folder.stage_metrics("reward_model"))
    by_chance = np.mean([np.log(np.arange(1, len(r.ranks) + 1)).sum() for r in data.rankings.train])
    assert records[1]["loss"] == pytest.approx(by_chance, abs=0.005), "a fresh head knows nothing: log K!"
    assert records[-1]["loss"] < records[1]["loss"] and 0 <= records[-1]["heldout/accuracy"] <= 1
    check_folder(config, folder, data, ["reward"], None)


def test_scores_of_several_aspects_and_groups(ray_cluster, model, data, tmp_path):
    aspects = {"correctness": 0.6, "politeness": 0.4}
    config, folder = train(model, data, tmp_path, kind="scores", aspects=aspects, groups={"minimum_labels": 5})
    records = read_metrics(folder.stage_metrics("reward_model"))
    assert records[1]["loss"] == pytest.approx(1.0, abs=0.05), "the variance of standardised marks"
    assert records[-1]["loss"] < records[1]["loss"] and records[-1]["heldout/explained_variance"] < 1
    groups = sorted({record.group for record in data.scores.train})
    check_folder(config, folder, data, [*aspects, *(f"group:{g}/{a}" for g in groups for a in aspects)], "mean")
    noted = json.loads((folder.reward_model / "config.json").read_text())
    assert noted["reward_weights"] == [0.6, 0.4] and noted["reward_marks"].keys() == aspects.keys()
