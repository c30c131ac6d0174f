"""Low-rank adapters on a Hugging Face model, from `peft`, without a wrapper: the model keeps its class and its interface.

Invariants: only adapters have gradients; before the first step the model's outputs are unchanged; `weights_of` gives the names
and shapes of the model's own folder, with and without adapters, so code that reads weights need not handle adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rlhf_ray.config.learner import LoraConfig
from rlhf_ray.errors import InputError
from rlhf_ray.models.cpu_linear import use_onednn

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

_ADAPTER = "default"
_PEFT_PREFIX = "base_model.model."
"""The prefix of the names in an adapter folder of `peft` and vLLM."""


class NotAdaptable(InputError, ValueError):
    """A model does not have the linear layers that adapters are configured for."""


@dataclass(frozen=True)
class Weight:
    """A tensor of a model's folder, and the parameters that it is computed from."""

    name: str
    shape: tuple[int, ...]
    parameters: tuple[nn.Parameter, ...]
    """These must be gathered, if they are sharded, while `value` is called."""
    value: Callable[[], Tensor]
    """Computes the tensor, without gradients. It may be the parameter itself."""


def add_adapters(model: nn.Module, config: LoraConfig, seed: int) -> nn.Module:
    """Add adapters to the model's linear layers, in place, and freeze everything else.

    Args:
        seed: the seed of A, which is random; the same on all ranks.

    Raises:
        NotAdaptable: a target is not a linear layer of the backbone.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    targets = config.target_modules
    if targets != "all-linear":
        _check_targets(model, targets)
    settings = PeftConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=targets,
        lora_dropout=config.dropout,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, model, _ADAPTER)
    model.register_state_dict_post_hook(_without_aliases)
    return use_onednn(model)


def has_adapters(model: nn.Module) -> bool:
    """Whether the model has adapters of `add_adapters`."""
    return getattr(model, "peft_config", None) is not None


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Scale the adapters to 0 until the block ends, which gives the base model. Sharding needs all layers to run."""
    layers = _adapted(model).values()
    for layer in layers:
        layer.set_scale(_ADAPTER, 0.0)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_scale(_ADAPTER, 1.0)


def weights_of(model: nn.Module) -> list[Weight]:
    """Every tensor of the model's Hugging Face folder. An adapted W is replaced by W + alpha/rank · B·A."""
    layers = _adapted(model) if has_adapters(model) else {}
    merged = {f"{path}.base_layer.weight": (path, layer) for path, layer in layers.items()}
    adapters = {id(p) for layer in layers.values() for p in _factors(layer)}
    weights = []
    for name, parameter in model.named_parameters():
        if name in merged:
            path, layer = merged[name]
            parts = (parameter, *_factors(layer))
            weights.append(Weight(f"{path}.weight", _shape(parameter), parts, _merging(layer)))
        elif id(parameter) not in adapters:
            weights.append(_plain(name.replace(".base_layer.", ".") if layers else name, parameter))
    return weights


def adapter_weights(model: nn.Module) -> list[Weight]:
    """A and B of every adapted layer, with the names of an adapter folder."""
    return [
        _plain(f"{_PEFT_PREFIX}{path}.lora_{letter}.weight", factor)
        for path, layer in _adapted(model).items()
        for letter, factor in zip("AB", _factors(layer), strict=True)
    ]


def save_adapter(model: nn.Module, tensors: dict[str, Tensor], folder: Path, base: str) -> None:
    """Write an adapter folder that `peft.PeftModel.from_pretrained` and vLLM can load.

    Args:
        tensors: the whole tensors of `adapter_weights`, on the CPU.
        base: the folder that the model was loaded from.
    """
    folder.mkdir(parents=True)
    settings = model.peft_config[_ADAPTER]
    settings.base_model_name_or_path, settings.inference_mode = base, True
    settings.save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _adapted(model: nn.Module) -> dict[str, LoraLayer]:
    from peft.tuners.lora import LoraLayer

    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}


def _factors(layer: LoraLayer) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight


def _merging(layer: LoraLayer) -> Callable[[], Tensor]:
    @torch.no_grad()
    def merge() -> Tensor:
        return layer.get_base_layer().weight + layer.get_delta_weight(_ADAPTER)

    return merge


def _plain(name: str, parameter: nn.Parameter) -> Weight:
    return Weight(name, _shape(parameter), (parameter,), parameter.detach)


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of the whole parameter. (A ZeRO-3 shard is flat.)"""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _without_aliases(model: nn.Module, state: dict[str, Tensor], prefix: str, _: object) -> None:
    """Remove the second name of a tied output layer: DeepSpeed excludes frozen weights from checkpoints by their first name."""
    first_names = {name for name, _ in model.named_parameters()}
    for name, _ in model.named_parameters(remove_duplicate=False):
        if name not in first_names:
            state.pop(prefix + name, None)


def _check_targets(model: nn.Module, targets: list[str]) -> None:
    """Check that the targets exist. Heads and embeddings, which may be tied, are not allowed."""
    output = model.get_output_embeddings()
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not output and n != "score"]
    unknown = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in linear)]
    if unknown:
        known = sorted({name.rpartition(".")[2] for name in linear})
        raise NotAdaptable(
            f"lora.target_modules: a model of type {model.config.model_type!r} has no linear layer {', '.join(unknown)}; "
            f"it has {', '.join(known)}"
        )
