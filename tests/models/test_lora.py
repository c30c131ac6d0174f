"""Adapters compared with `peft` and transformers: outputs, merging, saved folders."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from rlhf_ray.config.learner import LoraConfig
from rlhf_ray.models.loading import load_causal_lm, save_pretrained
from rlhf_ray.models.lora import (
    NotAdaptable,
    adapter_weights,
    add_adapters,
    has_adapters,
    save_adapter,
    weights_of,
    without_adapters,
)

CONFIG = LoraConfig(rank=4, alpha=6.0)
TOKENS = torch.arange(3, 40)[None]


def adapted(folder: Path, config: LoraConfig = CONFIG, trained: bool = True) -> nn.Module:
    """A model with adapters whose B is not zero, as after training."""
    model = add_adapters(load_causal_lm(folder), config, seed=0)
    if trained:
        generator = torch.Generator().manual_seed(1)
        for weight in adapter_weights(model):
            if "lora_B" in weight.name:
                weight.parameters[0].data = 0.2 * torch.randn(weight.shape, generator=generator)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(TOKENS).logits


def written(folder: Path, to: Path) -> nn.Module:
    """A trained model and its two folders."""
    model = adapted(folder)
    weights, adapters = ({w.name: w.value().clone() for w in read(model)} for read in (weights_of, adapter_weights))
    save_pretrained(model, weights, to, folder, adapters)
    return model


def test_new_adapters_do_not_change_the_outputs(tiny_model):
    model = adapted(tiny_model, trained=False)
    assert has_adapters(model) and not has_adapters(load_causal_lm(tiny_model))
    torch.testing.assert_close(logits(model), logits(load_causal_lm(tiny_model)), rtol=0, atol=1e-6)


def test_the_seed_decides_the_initial_adapters(tiny_model):
    def beginning(seed: int) -> torch.Tensor:
        torch.manual_seed(torch.seed())  # the test must not depend on earlier random state
        model = add_adapters(load_causal_lm(tiny_model), CONFIG, seed)
        return torch.cat([w.value().flatten() for w in adapter_weights(model)])

    assert torch.equal(beginning(3), beginning(3))
    assert not torch.equal(beginning(3), beginning(4))


def test_gradients_reach_the_adapters_and_nothing_else(tiny_model):
    model = adapted(tiny_model)
    adapters = {id(w.parameters[0]) for w in adapter_weights(model)}
    logits_ = model(TOKENS).logits
    logits_.log_softmax(-1)[..., 0].sum().backward()
    moved = {id(p) for p in model.parameters() if p.grad is not None and bool(p.grad.abs().max() > 0)}
    assert moved == adapters == {id(p) for p in model.parameters() if p.requires_grad}
    # Seven linear layers in each of two blocks, with two factors each.
    assert len(adapters) == 2 * 7 * 2


def test_merged_weights_are_pefts_own_merge(tiny_model, tmp_path):
    """They have the names, order and shapes of a model without adapters."""
    model = adapted(tiny_model)
    ours = {weight.name: weight.value() for weight in weights_of(model)}
    adapter = tmp_path / "adapter"
    save_adapter(model, {w.name: w.value() for w in adapter_weights(model)}, adapter, str(tiny_model))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), adapter).merge_and_unload()
    assert list(ours) == [name for name, _ in theirs.named_parameters()]
    for weight, (name, parameter) in zip(weights_of(model), theirs.named_parameters(), strict=True):
        assert weight.shape == tuple(parameter.shape)
        torch.testing.assert_close(ours[name], parameter, rtol=0, atol=1e-6)
    plain = dict(load_causal_lm(tiny_model).named_parameters())
    changed = {name for name in ours if not torch.equal(ours[name], plain[name])}
    assert changed == {name for name in ours if name.endswith("_proj.weight")}


def test_merging_takes_the_scale_from_the_config(tiny_model):
    model = adapted(tiny_model, LoraConfig(rank=8, alpha=4.0, target_modules=["q_proj"]))
    weights = {weight.name: weight for weight in weights_of(model)}
    weight = weights["model.layers.1.self_attn.q_proj.weight"]
    base, a, b = weight.parameters
    assert a.shape == (8, 64) and math.isclose(4.0 / 8, 0.5)
    torch.testing.assert_close(weight.value(), base + 0.5 * b @ a, rtol=0, atol=1e-6)
    assert [name for name in weights if len(weights[name].parameters) > 1] == [
        f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)
    ]


def test_both_folders_are_the_model(tiny_model, tmp_path):
    """The merged folder loads without adapter support, and the other one with `peft`."""
    model = written(tiny_model, tmp_path / "policy")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    expected = logits(model)
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    assert (logits(base) - expected).abs().max() > 0.1
    by_peft = PeftModel.from_pretrained(base, tmp_path / "policy" / "adapter")
    torch.testing.assert_close(logits(by_peft), expected, rtol=0, atol=1e-5)
    stored = load_file(tmp_path / "policy" / "model.safetensors")
    assert not any("lora" in name or "base_layer" in name for name in stored)


def test_without_adapters_it_is_the_reference(tiny_model):
    model = adapted(tiny_model)
    before = logits(model)
    with without_adapters(model):
        torch.testing.assert_close(logits(model), logits(load_causal_lm(tiny_model)), rtol=0, atol=1e-6)
    assert torch.equal(logits(model), before)
    with pytest.raises(RuntimeError, match="on the way"), without_adapters(model):
        raise RuntimeError("on the way")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("target", ["query", "lm_head", "embed_tokens", "proj"])
def test_targets_that_are_not_linear_layers_of_the_backbone_are_refused(tiny_model, target):
    with pytest.raises(
        NotAdaptable, match=f"'llama' has no linear layer {target}; it has down_proj, gate_proj, k_proj"
    ):
        add_adapters(load_causal_lm(tiny_model), LoraConfig(target_modules=["q_proj", target]), 0)
