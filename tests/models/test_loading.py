"""Model folders that are refused, and the properties of loaded models."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from rlhf_ray.models.loading import NotAModel, check_model_folder, load_causal_lm, load_scalar_model, load_tokenizer


@pytest.fixture
def copy(tiny_model, tmp_path) -> Path:
    """A copy of the model folder, for damaging."""
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_model_folder_passes(tiny_model):
    check_model_folder(tiny_model, "model.path")


def test_folders_without_a_model_are_refused(copy, tmp_path):
    def refusal(path: Path) -> str:
        with pytest.raises(NotAModel) as caught:
            check_model_folder(path, "ppo.policy_model")
        return str(caught.value)

    assert f"ppo.policy_model: '{tmp_path / 'absent'}' is not a folder" in refusal(tmp_path / "absent")
    assert "is not a folder" in refusal(copy / "config.json")
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert "no *.safetensors; other weight formats can run code and are refused" in refusal(copy)
    (copy / "config.json").unlink()
    assert "has no config.json" in refusal(copy)


def test_pickled_weights_are_not_loaded(tiny_model, copy):
    """Loading refuses it also without the check."""
    (copy / "model.safetensors").unlink()
    torch.save(load_causal_lm(tiny_model).state_dict(), copy / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_causal_lm(copy)


def test_tokenizers_that_cannot_be_used(copy):
    template = copy / "chat_template.jinja"
    text = template.read_text()
    template.unlink()
    with pytest.raises(NotAModel, match="has no chat template"):
        load_tokenizer(copy)
    template.write_text(text)
    edit(copy / "tokenizer_config.json", eos_token=None)
    with pytest.raises(NotAModel, match="no eos_token; responses could never end"):
        load_tokenizer(copy)


def test_a_fresh_head_has_the_std_of_the_paper(tiny_model):
    model = load_scalar_model(tiny_model)
    weight = model.score.weight
    assert weight.shape == (1, 64) and model.config.num_labels == 1
    assert weight.std().item() == pytest.approx(1 / math.sqrt(65), rel=0.3)
    assert (load_scalar_model(tiny_model).score.weight == weight).all(), "the same seed gives the same head"
    assert (load_scalar_model(tiny_model, seed=1).score.weight != weight).any()
    heads = torch.cat([load_scalar_model(tiny_model, seed=seed).score.weight.flatten() for seed in range(12)])
    assert heads.std().item() == pytest.approx(1 / math.sqrt(65), rel=0.08)


def test_the_backbone_is_that_of_the_language_model(tiny_model):
    ours, theirs = load_scalar_model(tiny_model), load_causal_lm(tiny_model)
    tokens = torch.arange(3, 12)[None]
    with torch.no_grad():
        assert torch.equal(ours.model(tokens).last_hidden_state, theirs.model(tokens).last_hidden_state)


def test_a_trained_head_is_kept(tiny_model, tmp_path):
    model = load_scalar_model(tiny_model, seed=5)
    model.save_pretrained(tmp_path / "trained")
    assert torch.equal(load_scalar_model(tmp_path / "trained", seed=0).score.weight, model.score.weight)


def test_dropout_and_cache_are_off(copy):
    edit(copy / "config.json", attention_dropout=0.3)
    config = load_causal_lm(copy).config
    assert config.attention_dropout == 0.0 and config.use_cache is False
    assert load_scalar_model(copy).config.attention_dropout == 0.0


def test_types(tiny_model):
    assert next(load_causal_lm(tiny_model, "bf16").parameters()).dtype == torch.bfloat16
    assert {p.dtype for p in load_scalar_model(tiny_model).parameters()} == {torch.float32}
