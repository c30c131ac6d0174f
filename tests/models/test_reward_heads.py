"""Rows of a reward model: their names, how they are combined to a reward, and that a plain folder holds all of this."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig

from rlhf_ray.models.loading import load_reward_model, load_scalar_model
from rlhf_ray.models.reward_heads import RewardHeads, RewardModelMismatch, normalisation, normalised_on, renormalise

ASPECTS = RewardHeads({"helpful": 0.7, "polite": 0.3}, ("cooks", "guests"))
GROUPS = RewardHeads({"reward": 1.0}, ("cooks", "guests"))


def test_names_and_readings():
    assert GROUPS.names == ("reward", "group:cooks", "group:guests")
    assert ASPECTS.names[2:] == (
        "group:cooks/helpful", "group:cooks/polite", "group:guests/helpful", "group:guests/polite",
    )  # fmt: skip
    assert GROUPS.coefficients().tolist() == [1, 0, 0]
    assert GROUPS.coefficients("guests").tolist() == [1, 0, 1]
    assert GROUPS.coefficients("mean").tolist() == [1, 0.5, 0.5]
    np.testing.assert_allclose(ASPECTS.coefficients("cooks"), [0.7, 0.3, 0.7, 0.3, 0, 0], rtol=1e-6)
    with pytest.raises(RewardModelMismatch, match="no annotator group 'chefs'; it has cooks, guests, mean"):
        GROUPS.coefficients("chefs")
    with pytest.raises(RewardModelMismatch, match="no annotator group 'mean'; it has none"):
        RewardHeads({"reward": 1.0}).coefficients("mean")


@pytest.mark.parametrize("heads", [GROUPS, ASPECTS, RewardHeads({"reward": 1.0}), RewardHeads({"a/b": 1.0}, ("x/y",))])
def test_the_config_returns_what_was_written(heads):
    outputs = np.random.default_rng(0).normal(2.0, 3.0, (50, len(heads)))
    config = LlamaConfig(num_labels=len(heads))
    heads.write(config, outputs)
    again = LlamaConfig.from_dict(json.loads(config.to_json_string()))
    assert RewardHeads.read(again) == heads
    for reading in heads.readings:
        joined = LlamaConfig.from_dict(json.loads(config.to_json_string()))
        rewards = outputs @ heads.join(joined, reading)
        mean, std = normalisation(joined)
        normalised = (rewards - mean) / std
        assert abs(normalised.mean()) < 1e-6 and normalised.std() == pytest.approx(1.0)
        assert RewardHeads.read(joined) == RewardHeads({"reward": 1.0})


def test_models_from_other_sources():
    assert RewardHeads.read(LlamaConfig(num_labels=1)) == RewardHeads({"LABEL_0": 1.0})
    assert normalisation(LlamaConfig()) == (0.0, 1.0)
    with pytest.raises(
        RewardModelMismatch, match="has the labels LABEL_0, LABEL_1; its config.json must have reward_weights"
    ):
        RewardHeads.read(LlamaConfig(num_labels=2))


@pytest.fixture
def trained(tiny_model, tmp_path) -> Path:
    """A folder with six different rows."""
    model = load_reward_model(tiny_model, ASPECTS, seed=1)
    with torch.no_grad():
        model.score.weight.normal_(generator=torch.Generator().manual_seed(2))
    ASPECTS.write(model.config, np.random.default_rng(1).normal(size=(20, 6)))
    model.save_pretrained(tmp_path / "trained")
    return tmp_path / "trained"


def test_new_rows_are_small_and_groups_start_at_zero(tiny_model):
    model = load_reward_model(tiny_model, ASPECTS)
    assert model.score.weight.shape == (6, 64) and model.config.num_labels == 6
    assert (model.score.weight[2:] == 0).all()
    assert torch.equal(load_reward_model(tiny_model, ASPECTS).score.weight, model.score.weight), "by the seed"
    rows = torch.cat([load_reward_model(tiny_model, GROUPS, seed=seed).score.weight[0] for seed in range(12)])
    assert rows.std().item() == pytest.approx(0.01 / math.sqrt(65), rel=0.08)


def test_transformers_loads_it(trained):
    model = AutoModelForSequenceClassification.from_pretrained(trained)
    assert model.config.num_labels == 6 and model.config.id2label[3] == "group:cooks/polite"
    assert model(torch.arange(3, 12)[None]).logits.shape == (1, 6)


def test_training_continues_from_rows_with_the_same_names(trained):
    rows = load_reward_model(trained, ASPECTS).score.weight
    other = RewardHeads({"polite": 1.0, "clear": 1.0}, ("guests",))
    again = load_reward_model(trained, other).score.weight
    assert torch.equal(again[0], rows[1]) and torch.equal(again[2], rows[5])
    assert (again[1] != 0).all() and (again[3] == 0).all(), "clear is new"


@pytest.mark.parametrize("reading", [None, "cooks", "mean"])
def test_a_reading_is_one_row_with_its_normalisation(trained, reading):
    whole, joined = load_reward_model(trained, ASPECTS), load_scalar_model(trained, reading=reading)
    states = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    expected = whole.score(states) @ torch.from_numpy(ASPECTS.coefficients(reading))
    torch.testing.assert_close(joined.score(states)[:, 0], expected, atol=1e-5, rtol=0)
    noted = json.loads((trained / "config.json").read_text())
    mean = noted["reward_mean"] if reading is None else noted["reward_groups"][reading]["mean"]
    assert normalisation(joined.config)[0] == pytest.approx(mean)


def test_a_joined_model_can_be_saved_and_read_again(trained, tmp_path):
    """This is how a value model starts from a reward model with several rows."""
    joined = load_scalar_model(trained)
    joined.save_pretrained(tmp_path / "value")
    assert torch.equal(load_scalar_model(tmp_path / "value").score.weight, joined.score.weight)


@pytest.mark.parametrize("reading", [None, "cooks"])
def test_a_reading_can_be_normalised_again(trained, tmp_path, reading):
    folder = tmp_path / "again"
    shutil.copytree(trained, folder)
    others = {name: normalisation(load_scalar_model(folder, reading=name).config) for name in ("guests", "mean")}
    assert normalised_on(folder, reading) is None
    renormalise(folder, reading, 0.25, 4.0, "five answers")
    assert normalised_on(folder, reading) == "five answers"
    assert normalisation(load_scalar_model(folder, reading=reading).config) == (0.25, 4.0)
    assert others == {name: normalisation(load_scalar_model(folder, reading=name).config) for name in others}
