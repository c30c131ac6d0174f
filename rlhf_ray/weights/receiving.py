"""Receiving weights inside vLLM's own worker process, in buckets of Hugging Face tensors.

Added to vLLM's worker class (`worker_extension_cls`), so that it works in every executor, also where tensor parallelism
puts the workers into processes of their own. It uses vLLM's layerwise reload: new values are copied into the tensors
that the kernels (and captured graphs) already hold.

Invariants: a reload that ended without every parameter raises; one that was cut off is closed before the next begins.
"""

from __future__ import annotations

import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rlhf_ray.rollout.requests import IncompleteWeights
from rlhf_ray.weights.bucket import WeightBucket, unpack


class BucketReload:
    """Methods of a vLLM worker, called by `collective_rpc`."""

    def begin_reload(self) -> None:
        """Open the model for new weights."""
        model = self.model_runner.get_model()
        # Layers that vLLM wrapped, to apply an adapter to them, load and report weights by the names of the model itself.
        self._awaited = {name.replace(".base_layer.", ".") for name, _ in model.named_parameters()}
        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(model)

    def load_bucket(self, bucket: WeightBucket) -> None:
        """Load some of the weights; may keep views of the bucket until all tensors of a layer are there."""
        with set_current_vllm_config(self.vllm_config):
            self._awaited -= self.model_runner.get_model().load_weights(unpack(bucket))

    def finish_reload(self) -> None:
        """Put the new weights to work.

        Raises:
            IncompleteWeights: some parameters never came.
        """
        self._close_reload()
        if self._awaited:
            missing = sorted(self._awaited)
            raise IncompleteWeights(
                f"{len(missing)} parameters were not sent, such as {missing[:3]}; a weight update must send all of them"
            )

    def abandon_update(self) -> None:
        """Close an update that was cut off. The weights are a mixture until a whole update has replaced them."""
        self._weight_update_active = False  # vLLM's own flag, for updates by its transfer engines
        self._close_reload()

    def _close_reload(self) -> None:
        model = self.model_runner.get_model()
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(model, self.model_config)
            _repack_shared_weights(model)


def _repack_shared_weights(model: torch.nn.Module) -> None:
    """Renew the packed copies that CPU kernels made of weights shared between layers.

    With tied embeddings the output layer's weight *is* the embedding's: a reload writes it in place and, having loaded
    nothing under the output layer's own name, leaves that layer's packed copy as it was. Layers that dropped their
    unpacked weight (of no elements now) were packed anew by the reload itself.
    """
    for layer in model.modules():
        if hasattr(layer, "cpu_linear") and layer.weight.numel() > 0:
            layer.quant_method.process_weights_after_loading(layer)
