"""Write a Hugging Face folder so that it is there whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer

from rlhf_ray.models.lora import save_adapter

ADAPTER = "adapter"
"""Where, in the folder of a model that was trained by adapters, these are by themselves, as `peft` writes them."""


def save_pretrained(
    model: nn.Module,
    weights: dict[str, torch.Tensor],
    folder: Path,
    tokenizer_from: str | Path,
    adapters: dict[str, torch.Tensor] | None = None,
) -> None:
    """Configuration, safetensors, generation settings and tokenizer, in `folder`, replacing what is there.

    Args:
        model: the architecture; its own (perhaps sharded) parameters are not read.
        weights: Hugging Face name to full CPU tensor. Tied weights appear once.
        tokenizer_from: folder whose tokenizer and chat template go along.
        adapters: name to full CPU tensor, where the weights hold them merged; they are written to `adapter`, too.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary, state_dict=weights)
    AutoTokenizer.from_pretrained(str(tokenizer_from), trust_remote_code=False).save_pretrained(temporary)
    if adapters:
        save_adapter(model, adapters, temporary / ADAPTER, str(tokenizer_from))
    replace_folder(temporary, folder)


def replace_folder(temporary: Path, folder: Path) -> None:
    """Rename `temporary` to `folder`; an existing one steps aside first and is removed after."""
    old = folder.with_name(f".{folder.name}.old.{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
