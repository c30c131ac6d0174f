"""The tensors of a Hugging Face folder, one at a time. Safetensors only: other formats can run code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open


def read_folder(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Names with tensors, in the order of the files.

    Raises:
        FileNotFoundError: there is no safetensors file.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{str(folder)!r} has no *.safetensors; expected a Hugging Face model folder")
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                yield name, tensors.get_tensor(name)
