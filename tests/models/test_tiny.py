"""The tiny model: an ordinary, reproducible Hugging Face folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rlhf_ray.models.tiny import build_tiny_model, train_tokenizer

TEXTS = ["Where is order 42?", "Thank you for your message.", "On 3 May, at 12 Hill Road."] * 20
SIZES = {"vocab_size": 320, "hidden_size": 32, "layers": 2, "heads": 4, "kv_heads": 2, "max_positions": 64}


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_the_folder_loads_as_any_other_model_and_generates(tmp_path, architecture):
    count = build_tiny_model(tmp_path / "model", TEXTS, architecture=architecture, seed=1, **SIZES)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.config.model_type == architecture
    assert count == model.num_parameters()
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert GenerationConfig.from_pretrained(tmp_path / "model").eos_token_id == tokenizer.eos_token_id
    inputs = tokenizer("Where is order", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=3, min_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_same_seed_same_files_and_the_callers_random_stream_is_untouched(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    for name, seed in (("one", 1), ("two", 1), ("other", 2)):
        build_tiny_model(tmp_path / name, TEXTS, seed=seed, **SIZES)
    assert torch.equal(torch.rand(1), expected)
    one, two, other = (digests(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    assert one["model.safetensors"] != other["model.safetensors"]
    assert one["tokenizer.json"] == other["tokenizer.json"]


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_the_loaded_tokenizer_is_the_trained_one(tmp_path, architecture):
    build_tiny_model(tmp_path / "model", TEXTS, architecture=architecture, **SIZES)
    trained = train_tokenizer(TEXTS, SIZES["vocab_size"], 64, architecture)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert loaded.get_vocab() == trained.get_vocab()
    assert len(loaded) <= SIZES["vocab_size"]
    for text in [*TEXTS[:3], "Grüße 123456 it's\n\nso"]:
        assert loaded.encode(text) == trained.encode(text)


def test_the_tokenizer_keeps_any_text_and_its_special_tokens_apart():
    tokenizer = train_tokenizer(TEXTS, 400, 64)
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_start|>")}) == 3
    assert tokenizer.eos_token == "<|im_end|>"
    for text in ("Where is order 42?", "Grüße, 你好 — 123456!", "\n\n  two  spaces\t"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert len(tokenizer.encode(" 42", add_special_tokens=False)) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"vocab_size": 200}, "vocab_size 200: must be at least 259"),
        ({"hidden_size": 30}, "hidden_size 30 must be a multiple of heads 4"),
        ({"kv_heads": 3}, "heads of kv_heads 3"),
        ({"architecture": "gpt"}, "architecture 'gpt': allowed are llama, qwen2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_and_nothing_is_left(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        build_tiny_model(tmp_path / "model", TEXTS, **(SIZES | wrong))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_overwritten(tmp_path):
    with pytest.raises(FileExistsError, match="a new model needs a new folder"):
        build_tiny_model(tmp_path, TEXTS, **SIZES)
