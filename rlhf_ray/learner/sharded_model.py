"""A model under DeepSpeed that evaluates and trains ragged batches in micro-batches.

Invariants: the loss of an optimizer step is Σ weights·token loss over the minibatch of all ranks, for any number of ranks, any
micro-batches and any ZeRO stage; a step whose loss is not finite is refused on every rank before it changes the weights.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rlhf_ray.algorithms.diagnostics import Diagnostics
from rlhf_ray.batch import TARGET_COLUMNS, Batch, Layout, ModelInput, pack, pad
from rlhf_ray.config.learner import LearnerConfig
from rlhf_ray.learner.deepspeed_engine import clips_itself
from rlhf_ray.learner.objectives import Objective
from rlhf_ray.models.loading import save_pretrained
from rlhf_ray.models.lora import Weight, adapter_weights, weights_of
from rlhf_ray.models.packing import enable_packing


def gathered(weights: Sequence[Weight], bucket_bytes: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name and the whole tensor of each weight; a tensor is valid until the next one is requested.

    Args:
        bucket_bytes: the size of the parameters that are gathered at a time under ZeRO 3; a larger tensor is gathered alone.
    """
    import deepspeed

    for chunk in _chunks(weights, bucket_bytes):
        sharded = [p for weight in chunk for p in weight.parameters if hasattr(p, "ds_id")]
        with deepspeed.zero.GatheredParameters(sharded, modifier_rank=None):
            for weight in chunk:
                yield weight.name, weight.value()


def _chunks(weights: Sequence[Weight], bucket_bytes: int) -> Iterator[list[Weight]]:
    chunk: list[Weight] = []
    size = 0
    for weight in weights:
        size_of = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in weight.parameters)
        if chunk and size + size_of > bucket_bytes:
            yield chunk
            chunk, size = [], 0
        chunk.append(weight)
        size += size_of
    if chunk:
        yield chunk


Compute = Callable[[nn.Module, ModelInput], torch.Tensor]
"""A forward pass without gradients: float32 [m], or [b] for models that score whole sequences."""


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step."""

    loss: float
    """The loss over the global minibatch."""
    grad_norm: float
    """The global gradient norm, before clipping."""
    learning_rate: float
    diagnostics: Diagnostics
    """The diagnostics over the sequences of all ranks."""


class NonFiniteLoss(RuntimeError):
    """The loss of a step is NaN or infinite; the weights are unchanged."""


class ShardedModel:
    """One rank's share of a model."""

    def __init__(self, engine: Any, config: LearnerConfig, rank: int, world_size: int) -> None:
        self.engine = engine
        self.config = config
        self.rank = rank
        self.world_size = world_size
        self.device = torch.device(engine.device)
        self.hf_model: nn.Module = engine.module.model
        self.lay_out: Layout = pack if config.packing else pad
        if config.packing:
            enable_packing(self.hf_model, engine, exact=config.precision == "fp32")
        engine.train()

    @torch.no_grad()
    def evaluate(self, batch: Batch, micro_batches: Sequence[np.ndarray], compute: Compute) -> np.ndarray:
        """The concatenated results of all micro-batches. Empty ones take part in the forward passes and add nothing."""
        results = []
        for indices in micro_batches:
            part = batch.select(indices) if len(indices) else _EMPTY
            result = compute(self.engine, self.lay_out(part, self.device))
            if len(indices):
                results.append(result.float().cpu().numpy())
        return np.concatenate(results) if results else np.zeros(0, dtype=np.float32)

    @torch.no_grad()
    def measure(self, batch: Batch, micro_batches: Sequence[np.ndarray], objective: Objective) -> Diagnostics:
        """Compute the diagnostics of an objective over the sequences of all ranks, without a step."""
        parts = []
        for indices in micro_batches:
            part = batch.select(indices) if len(indices) else _empty_like(batch)
            _, diagnostics = objective(self.engine, self.lay_out(part, self.device), part)
            if len(indices):
                parts.append(diagnostics)
        return self._over_ranks(functools.reduce(operator.add, parts) if parts else None)

    def step(
        self, batch: Batch, micro_batches: Sequence[np.ndarray], objective: Objective, learning_rate: float
    ) -> StepResult:
        """Take one optimizer step over a minibatch.

        Raises:
            NonFiniteLoss: on all ranks, if the loss of any rank is not finite.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        parts: list[Diagnostics] = []
        for number, indices in enumerate(micro_batches):
            self.engine.set_gradient_accumulation_boundary(number == len(micro_batches) - 1)
            part = batch.select(indices) if len(indices) else _empty_like(batch)
            loss, diagnostics = objective(self.engine, self.lay_out(part, self.device), part)
            # DeepSpeed averages gradients over ranks. The weights are relative to the global batch, so undo the mean.
            self.engine.backward(loss * self.world_size)
            total += loss.detach().double()
            if len(indices):
                parts.append(diagnostics)
        self._vote(total)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = self._clip() if clips_itself(self.config) else None
        self.engine.step()
        norm = self.engine.get_global_grad_norm() if norm is None else norm
        diagnostics = self._over_ranks(functools.reduce(operator.add, parts) if parts else None)
        return StepResult(total.item(), float(norm), learning_rate, diagnostics)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            torch.distributed.barrier()

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. All ranks get the same answer."""
        if self.world_size == 1:
            return flag
        vote = torch.tensor(float(flag), device=self.device)
        torch.distributed.all_reduce(vote)
        return vote.item() > 0

    def weight_shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """The name and full shape of every tensor, in the order of `named_weights`."""
        return [(weight.name, weight.shape) for weight in weights_of(self.hf_model)]

    def named_weights(self, bucket_bytes: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the Hugging Face name and full tensor of all weights, adapters merged. All ranks gather a bucket at a time."""
        return gathered(weights_of(self.hf_model), bucket_bytes)

    def named_adapters(self, bucket_bytes: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the name and full tensor of the adapters only, with the names of an adapter folder."""
        return gathered(adapter_weights(self.hf_model), bucket_bytes)

    def save_pretrained(self, folder: Path, tokenizer_from: str) -> None:
        """Write a Hugging Face folder on rank 0; all ranks gather. Adapters are merged, and also written to `adapter`."""
        adapters = self._on_rank_0(self.named_adapters(_SAVING_BYTES)) if self.config.lora else {}
        weights = self._on_rank_0(self.named_weights(_SAVING_BYTES))
        if self.rank == 0:
            save_pretrained(self.hf_model, weights, folder, tokenizer_from, adapters)

    def save_state(self, folder: str, client_state: dict[str, Any]) -> None:
        """Write this rank's share of the weights (only the adapters, if there are some) and of the optimizer state."""
        self.engine.save_checkpoint(
            folder,
            tag="state",
            client_state=client_state,
            save_latest=False,
            exclude_frozen_parameters=self.config.lora is not None,
        )

    def load_state(self, folder: str) -> dict[str, Any]:
        """Read this rank's share; returns the client state that `save_state` was given.

        Raises:
            RuntimeError: nothing was loaded, which DeepSpeed itself may ignore.
        """
        path, client_state = None, {}
        if (Path(folder) / "state").is_dir():
            path, client_state = self.engine.load_checkpoint(
                folder, tag="state", load_module_strict=self.config.lora is None
            )
        if path is None:
            raise RuntimeError(f"rank {self.rank} found no learner state in {folder!r}")
        return client_state

    def _on_rank_0(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Copies of the tensors on the CPU of rank 0. The other ranks take part in gathering and get nothing."""
        kept = {}
        for name, tensor in tensors:
            if self.rank == 0:
                kept[name] = tensor.to("cpu", copy=True).contiguous()
        return kept

    def _over_ranks(self, diagnostics: Diagnostics | None) -> Diagnostics:
        """Sum the diagnostics over ranks; a rank without sequences passes None."""
        if self.world_size == 1:
            assert diagnostics is not None
            return diagnostics.cpu()
        gathered: list[Diagnostics | None] = [None] * self.world_size
        torch.distributed.all_gather_object(gathered, None if diagnostics is None else diagnostics.cpu())
        return functools.reduce(operator.add, (part for part in gathered if part is not None))

    def _clip(self) -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_(self.engine.module.parameters(), self.config.optimizer.max_grad_norm)

    def _vote(self, loss: torch.Tensor) -> None:
        """Sum the loss over ranks in place; refuse the step on all ranks if the loss of any rank is not finite."""
        if self.world_size > 1:
            torch.distributed.all_reduce(loss)
        if not torch.isfinite(loss):
            self.engine.zero_grad()
            raise NonFiniteLoss(
                f"the loss is {loss.item()}, so the step was refused and the weights are unchanged; look for non-finite "
                "rewards or advantages in the last metrics, or lower optimizer.learning_rate"
            )


_SAVING_BYTES = 1 << 30
"""The size of the parameters that are gathered at a time while a model is saved."""

_EMPTY = Batch(np.zeros(4, dtype=np.int32), np.asarray([2, 2]), np.asarray([False, True, False, True]))
"""A pair of the shortest sequences with a target, which a rank computes when it has no sequences."""


def _empty_like(batch: Batch) -> Batch:
    """`_EMPTY` with the columns of the batch, all zero: it takes part in collective operations and contributes nothing."""
    present = {name: np.zeros(2, dtype=np.float32) for name in TARGET_COLUMNS if getattr(batch, name) is not None}
    labels = None if batch.labels is None else np.zeros((2, batch.labels.shape[1]), dtype=np.float32)
    starts = None if batch.element_starts is None else np.asarray([True, False])
    return replace(_EMPTY.with_columns(**present), labels=labels, element_starts=starts)
