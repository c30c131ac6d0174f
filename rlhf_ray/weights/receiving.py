"""How a vLLM engine takes new weights: the whole model in buckets (`BucketReload`), or a LoRA adapter (`AdapterSlot`).

Imported only in processes that run vLLM. Invariants: a reload that ends without every parameter raises; one that was cut off is
closed before the next begins. An adapter is replaced as a whole, under one id, after all of it has arrived; it belongs to the
model that the engine was started with, so an engine whose base model was replaced accepts no adapters any more.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from vllm.config import set_current_vllm_config
from vllm.lora.request import LoRARequest
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rlhf_ray.config.learner import LoraConfig
from rlhf_ray.rollout.requests import IncompleteWeights
from rlhf_ray.weights.bucket import WeightBucket, unpack

_ADAPTER_NAME, _ADAPTER_ID = "policy", 1


class BucketReload:
    """Methods added to vLLM's worker class (`worker_extension_cls`) and called by `collective_rpc`.

    They work in every executor, also if tensor parallelism puts the workers into processes of their own. vLLM's layerwise reload
    copies the new values into the tensors that the kernels (and captured graphs) already hold.
    """

    model_runner: Any
    model_config: Any
    vllm_config: Any

    def begin_reload(self) -> None:
        """Open the model for new weights."""
        model = self.model_runner.get_model()
        # Layers that vLLM wrapped to apply an adapter still load and report weights by the model's own names.
        self._awaited = {name.replace(".base_layer.", ".") for name, _ in model.named_parameters()}
        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(model)

    def load_bucket(self, bucket: WeightBucket) -> None:
        """Load some of the weights; may keep views of the bucket until all tensors of a layer have arrived."""
        with set_current_vllm_config(self.vllm_config):
            self._awaited -= self.model_runner.get_model().load_weights(unpack(bucket))

    def finish_reload(self) -> None:
        """Put the new weights to use.

        Raises:
            IncompleteWeights: some parameters were not sent.
        """
        self._close_reload()
        if self._awaited:
            missing = sorted(self._awaited)
            raise IncompleteWeights(
                f"{len(missing)} parameters were not sent, such as {missing[:3]}; a weight update must send all of them"
            )

    def abandon_update(self) -> None:
        """Close an update that was cut off. The weights are a mixture until a complete update has replaced them."""
        self._weight_update_active = False  # vLLM's own flag, for updates by its transfer engines
        self._close_reload()

    def _close_reload(self) -> None:
        model = self.model_runner.get_model()
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(model, self.model_config)
            _repack_shared_weights(model)


def _repack_shared_weights(model: torch.nn.Module) -> None:
    """Renew the packed copies that CPU kernels made of weights shared between layers.

    With tied embeddings the output layer's weight *is* the embedding's. A reload writes it in place but loads nothing under the
    output layer's own name, so that layer's packed copy stays as it was. Layers that dropped their unpacked weight (it has no
    elements now) were packed again by the reload itself.
    """
    for layer in model.modules():
        if hasattr(layer, "cpu_linear") and layer.weight.numel() > 0:
            layer.quant_method.process_weights_after_loading(layer)


class AdapterSlot:
    """The adapter that an engine applies, and the next one while it arrives."""

    def __init__(self, config: LoraConfig) -> None:
        self.config = config
        self.request: LoRARequest | None = None
        """Passed with every generation request; None: the base model alone, which is the policy before the first update."""
        self._arriving: dict[str, torch.Tensor] = {}

    def begin(self) -> None:
        """Start a new adapter; tensors of an update that was cut off are discarded."""
        self._arriving = {}

    def add(self, bucket: WeightBucket) -> None:
        """Keep a copy of some of the tensors."""
        self._arriving |= {name: tensor.clone() for name, tensor in unpack(bucket)}

    def finish(self, llm: Any) -> None:
        """Replace the adapter in vLLM's `LLMEngine` by the one that has arrived.

        vLLM reads adapters from folders; this one exists only during the call.
        """
        with TemporaryDirectory(prefix="rlhf-ray-adapter-") as folder:
            save_file(self._arriving, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
            (Path(folder) / "adapter_config.json").write_text(json.dumps(self._peft_config()))
            llm.add_lora(LoRARequest(_ADAPTER_NAME, _ADAPTER_ID, folder, load_inplace=True))
            self.request = LoRARequest(_ADAPTER_NAME, _ADAPTER_ID, folder)
        self._arriving = {}

    def _peft_config(self) -> dict[str, Any]:
        layers = sorted({name.rpartition(".lora_")[0].rpartition(".")[2] for name in self._arriving})
        return {"peft_type": "LORA", "r": self.config.rank, "lora_alpha": self.config.alpha, "target_modules": layers}
