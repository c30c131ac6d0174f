"""An adapter that travels by itself: vLLM applies it to the base model, which stays as it was loaded.

Invariants: an adapter is replaced whole, under one id, when all of it is there; what a publication sends is A and B of each layer
and nothing of the base, so an engine whose base was replaced takes no adapter any more.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from vllm.lora.request import LoRARequest

from rlhf_ray.config.learner import LoraConfig
from rlhf_ray.weights.bucket import WeightBucket, unpack

_NAME, _ID = "policy", 1
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM can reserve room for."""


def lora_arguments(config: LoraConfig) -> dict[str, Any]:
    """vLLM's engine arguments for one adapter of such a rank."""
    rank = next(rank for rank in _RANKS if rank >= config.rank)
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}


class AdapterSlot:
    """The adapter of an engine, and the next one while it arrives."""

    def __init__(self, config: LoraConfig) -> None:
        self.config = config
        self.request: LoRARequest | None = None
        """Of every generation; None: the base alone, which is the policy before the first publication."""
        self._arriving: dict[str, torch.Tensor] = {}

    def begin(self) -> None:
        """Forget what came of an update that was cut off."""
        self._arriving = {}

    def add(self, bucket: WeightBucket) -> None:
        """Keep a copy of some of the tensors."""
        self._arriving |= {name: tensor.clone() for name, tensor in unpack(bucket)}

    def finish(self, llm: Any) -> None:
        """Give the adapter to vLLM's `LLMEngine`, in the place of the last one.

        vLLM reads adapters from folders; this one exists for the time of the call.
        """
        with TemporaryDirectory(prefix="rlhf-ray-adapter-") as folder:
            save_file(self._arriving, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
            (Path(folder) / "adapter_config.json").write_text(json.dumps(self._peft_config()))
            llm.add_lora(LoRARequest(_NAME, _ID, folder, load_inplace=True))
            self.request = LoRARequest(_NAME, _ID, folder)
        self._arriving = {}

    def _peft_config(self) -> dict[str, Any]:
        layers = sorted({name.rpartition(".lora_")[0].rpartition(".")[2] for name in self._arriving})
        return {"peft_type": "LORA", "r": self.config.rank, "lora_alpha": self.config.alpha, "target_modules": layers}
