"""Loads and saves Hugging Face folders: safetensors only, no remote code, no dropout.

A reward or value model is an ordinary `AutoModelForSequenceClassification` folder. The `config.json` of a reward model holds the
meaning of its labels and its normalisation (`RewardHeads`).
"""

from __future__ import annotations

import math
import os
import shutil
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
from rlhf_ray.models.lora import save_adapter
from rlhf_ray.models.reward_heads import RewardHeads, RewardModelMismatch

Dtype = Literal["fp32", "bf16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class NotAModel(InputError, ValueError):
    """A path does not hold a usable Hugging Face model."""


def check_model_folder(path: str | Path, what: str) -> None:
    """Check that a path is a model folder.

    Raises:
        NotAModel: naming the folder, the config key `what`, and what is missing.
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
    """Whether a path is a name such as `organisation/model`: one slash, not written as a path, and no such folder exists."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).exists()


def local_folder(path: str) -> str:
    """The absolute path of a folder, or of a hub model, which is downloaded first (safetensors and text files only).

    Actors run offline, so the driver downloads models once.

    Raises:
        NotAModel: the path is not a folder, and the hub model cannot be downloaded.
    """
    if not is_hub_name(path):
        return str(Path(path).expanduser().absolute())
    try:
        return snapshot_download(path, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"])
    except (OSError, HfHubHTTPError) as error:
        raise NotAModel(
            f"{path!r} is not a folder on this machine, and it cannot be downloaded as a hub model: {error}"
        ) from error


def check_same_tokenizer(path: str, other: str, what: str) -> None:
    """Check that two models have the same vocabulary, so that token ids mean the same to both.

    Raises:
        NotAModel: naming both models.
    """
    if load_tokenizer(path).get_vocab() != load_tokenizer(other).get_vocab():
        raise NotAModel(
            f"{what}: the tokenizer of {path!r} differs from that of the policy, {other!r}; token ids would not match"
        )


def check_reward_model(path: str, reading: str | None) -> None:
    """Check that a folder is a reward model with the reading (see `RewardHeads`).

    Raises:
        RewardModelMismatch: naming the folder and what it holds.
    """
    config = _config(path)
    if not _has_head(config):
        raise RewardModelMismatch(
            f"{path!r} holds a {', '.join(config.architectures or ['model of unknown type'])}, which has no reward head; a "
            "reward model is a sequence-classification folder"
        )
    RewardHeads.read(config).coefficients(reading)


def context_of(folder: str) -> int:
    """The maximum number of tokens that the folder's model reads."""
    return int(_config(folder).max_position_embeddings)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer.

    Raises:
        NotAModel: the tokenizer has no chat template or no end-of-sequence token.
    """
    tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    if tokenizer.chat_template is None:
        raise NotAModel(f"the tokenizer of {str(path)!r} has no chat template; add one to its tokenizer_config.json")
    if tokenizer.eos_token_id is None:
        raise NotAModel(f"the tokenizer of {str(path)!r} has no eos_token; responses could never end")
    return tokenizer


def load_causal_lm(path: str | Path, dtype: Dtype = "fp32", attention: str = "sdpa") -> nn.Module:
    """The folder's language model, ready for training (no cache, no dropout)."""
    model = AutoModelForCausalLM.from_pretrained(str(path), config=_config(path), **_options(dtype, attention))
    return use_onednn(model)


def load_scalar_model(
    path: str | Path, dtype: Dtype = "fp32", attention: str = "sdpa", seed: int = 0, reading: str | None = None
) -> nn.Module:
    """The folder's backbone with one scalar output per token.

    The rows of a reward model are combined to the reward of `reading` (see `RewardHeads`). Its normalisation stays in the config
    and is not applied. A folder without a head (a language model) gets a new one with std 1/√(d+1) (algorithms 1.11, Stiennon
    et al. 2020).

    Raises:
        RewardModelMismatch: the reward model has no such reading.
    """
    model, stored = _load_classifier(path, dtype, attention)
    if stored is None:
        return _with_head(model, _fresh_rows(model, 1, seed))
    heads, rows = stored
    return _with_head(model, torch.from_numpy(heads.join(model.config, reading)[None, :]) @ rows)


def load_reward_model(
    path: str | Path, heads: RewardHeads, dtype: Dtype = "fp32", attention: str = "sdpa", seed: int = 0
) -> nn.Module:
    """The folder's backbone with the rows of `heads`, ready for training.

    Rows of the folder with the same names are kept. New aspects have std 0.01/√(d+1), a hundredth of the usual, so the first
    rewards hardly differ and the first loss is log 2. (The usual std costs 0.85 on hh-rlhf, and the first steps unlearn noise.)
    The rows of new groups are zero.
    """
    model, stored = _load_classifier(path, dtype, attention)
    rows = 0.01 * _fresh_rows(model, len(heads), seed)
    rows[len(heads.weights) :] = 0.0
    if stored is not None:
        known = dict(zip(stored[0].names, stored[1], strict=True))
        if len(stored[0].weights) == len(heads.weights) == 1:  # a single aspect may have any name
            known[heads.names[0]] = stored[1][0]
        for row, name in enumerate(heads.names):
            rows[row] = known.get(name, rows[row])
    return _with_head(model, rows)


def _load_classifier(
    path: str | Path, dtype: Dtype, attention: str
) -> tuple[nn.Module, tuple[RewardHeads, torch.Tensor] | None]:
    """The model and, if the folder has a head, the meaning of its rows and their weights, float32 [rows, d]."""
    import deepspeed

    config = _config(path)
    has_head = _has_head(config)
    if not has_head:
        config.num_labels = 1
    model = AutoModelForSequenceClassification.from_pretrained(str(path), config=config, **_options(dtype, attention))
    if not has_head:
        return model, None
    weight = model.score.weight
    with deepspeed.zero.GatheredParameters([weight] if hasattr(weight, "ds_id") else []):
        return model, (RewardHeads.read(config), weight.detach().float().cpu().clone())


def _has_head(config: PreTrainedConfig) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def _fresh_rows(model: nn.Module, count: int, seed: int) -> torch.Tensor:
    """Random rows with std 1/√(d+1): float32 [count, d]."""
    width = model.score.in_features
    return torch.randn((count, width), generator=torch.Generator().manual_seed(seed)) / math.sqrt(width + 1)


def _with_head(model: nn.Module, rows: torch.Tensor) -> nn.Module:
    """The model with a new head, float32 [rows, d]. Under ZeRO 3 DeepSpeed shards the new head later, like the model."""
    count, width = rows.shape
    weight = model.score.weight
    head = nn.Linear(width, count, bias=False, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        head.weight.copy_(rows)
    model.score, model.num_labels = head, count
    if model.config.num_labels != count:
        model.config.num_labels = count
    return use_onednn(model)


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


ADAPTER = "adapter"
"""Subfolder for the adapters alone, in `peft`'s format, in the folder of a model that was trained with adapters."""


def save_pretrained(
    model: nn.Module,
    weights: dict[str, torch.Tensor],
    folder: Path,
    tokenizer_from: str | Path,
    adapters: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write configuration, safetensors, generation settings and tokenizer to `folder`, replacing it.

    Args:
        model: the architecture; its own (perhaps sharded) parameters are not read.
        weights: Hugging Face name to full CPU tensor. Tied weights appear once.
        tokenizer_from: the folder whose tokenizer and chat template are copied.
        adapters: name to full CPU tensor of the adapters that are merged into the weights; also written to `adapter`.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary, state_dict=weights)
    AutoTokenizer.from_pretrained(str(tokenizer_from), trust_remote_code=False).save_pretrained(temporary)
    if adapters:
        save_adapter(model, adapters, temporary / ADAPTER, str(tokenizer_from))
    replace_folder(temporary, folder)


def replace_folder(temporary: Path, folder: Path) -> None:
    """Rename `temporary` to `folder`. An existing folder is renamed first and removed afterwards."""
    old = folder.with_name(f".{folder.name}.old.{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
