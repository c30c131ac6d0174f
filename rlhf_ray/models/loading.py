"""Hugging Face folders in and out: safetensors only, no remote code, dropout off.

A reward or value model is an ordinary `AutoModelForSequenceClassification` folder with one label; a reward model's
normalisation (`reward_mean`, `reward_std` on reference samples) is part of its `config.json`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from rlhf_ray.errors import InputError
from rlhf_ray.models.cpu_linear import use_onednn

Dtype = Literal["fp32", "bf16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class NotAModel(InputError, ValueError):
    """A path that should hold a Hugging Face model does not."""


def check_model_folder(path: str | Path, what: str) -> None:
    """Refuse what is no model folder before anything starts.

    Raises:
        NotAModel: naming the folder, `what` needs it, and what is missing.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise NotAModel(f"{what}: {str(path)!r} is not a folder; expected a Hugging Face model folder")
    if not (folder / "config.json").is_file():
        raise NotAModel(f"{what}: {str(path)!r} has no config.json; expected a Hugging Face model folder")
    if not any(folder.glob("*.safetensors")):
        raise NotAModel(
            f"{what}: {str(path)!r} has no *.safetensors; other weight formats can run code and are refused"
        )


def is_hub_name(path: str) -> bool:
    """`organisation/model`: one slash, nothing that looks like a path, and no such folder."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).exists()


def local_folder(path: str) -> str:
    """The folder itself, or that of a hub model, downloaded first (safetensors and text files only).

    Actors run offline, so this happens once, in the driver.

    Raises:
        NotAModel: neither a folder nor to be had from a hub.
    """
    if not is_hub_name(path):
        return str(Path(path).expanduser().absolute())
    try:
        return snapshot_download(path, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"])
    except (OSError, HfHubHTTPError) as error:
        raise NotAModel(
            f"{path!r} is no folder here, and as the name of a hub model it cannot be fetched: {error}"
        ) from error


def check_same_tokenizer(path: str, other: str, what: str) -> None:
    """Refuse models that would read each other's token ids as something else.

    Raises:
        NotAModel: naming both.
    """
    if load_tokenizer(path).get_vocab() != load_tokenizer(other).get_vocab():
        raise NotAModel(
            f"{what}: the tokenizer of {path!r} is not that of the policy, {other!r}; token ids would not match"
        )


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer.

    Raises:
        NotAModel: it has no chat template, or no end-of-sequence token.
    """
    tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    if tokenizer.chat_template is None:
        raise NotAModel(f"the tokenizer of {str(path)!r} has no chat template; add one to its tokenizer_config.json")
    if tokenizer.eos_token_id is None:
        raise NotAModel(f"the tokenizer of {str(path)!r} has no eos_token; responses could never end")
    return tokenizer


def load_causal_lm(path: str | Path, dtype: Dtype = "fp32", attention: str = "sdpa") -> nn.Module:
    """The folder's language model, in training shape (no cache, no dropout)."""
    model = AutoModelForCausalLM.from_pretrained(str(path), config=_config(path), **_options(dtype, attention))
    return use_onednn(model)


def load_scalar_model(path: str | Path, dtype: Dtype = "fp32", attention: str = "sdpa", seed: int = 0) -> nn.Module:
    """The folder's backbone with one scalar output per token.

    A folder that has no such head (a language model) gets one with std 1/√(d+1) (algorithms 1.11, Stiennon et al. 2020).
    """
    config = _config(path, num_labels=1)
    has_head = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    model = AutoModelForSequenceClassification.from_pretrained(str(path), config=config, **_options(dtype, attention))
    if not has_head:
        weight = model.score.weight
        generator = torch.Generator().manual_seed(seed)
        fresh = torch.randn(weight.shape, generator=generator) / math.sqrt(weight.shape[-1] + 1)
        _assign(weight, fresh)
    return use_onednn(model)


def _assign(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Set a parameter that DeepSpeed may have sharded over the ranks."""
    import deepspeed

    sharded = hasattr(parameter, "ds_id")
    with deepspeed.zero.GatheredParameters([parameter] if sharded else [], modifier_rank=0 if sharded else None):
        with torch.no_grad():
            parameter.copy_(value.to(parameter.dtype))


def _config(path: str | Path, **overrides: object) -> PreTrainedConfig:
    config = AutoConfig.from_pretrained(str(path), trust_remote_code=False, **overrides)
    for name in vars(config):
        if "dropout" in name or name.endswith("pdrop"):
            setattr(config, name, 0.0)
    config.use_cache = False
    return config


def _options(dtype: Dtype, attention: str) -> dict[str, object]:
    return {
        "dtype": _DTYPES[dtype],
        "attn_implementation": attention,
        "use_safetensors": True,
        "trust_remote_code": False,
    }
