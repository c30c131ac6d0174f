"""A model under DeepSpeed that evaluates and trains ragged batches in micro-batches.

Invariants: the loss of an optimizer step is Σ weights·token loss over the whole minibatch of all ranks, whatever the ranks, the
micro-batches and the ZeRO stage; a step whose loss is not finite is refused on every rank before it touches the weights.
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
from rlhf_ray.learner.engine import clips_itself
from rlhf_ray.learner.objectives import Objective
from rlhf_ray.models.packing import enable_packing
from rlhf_ray.models.saving import save_pretrained

Compute = Callable[[nn.Module, ModelInput], torch.Tensor]
"""A forward pass without gradient: float32 [m], or [b] for models that score whole sequences."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did."""

    loss: float
    """Over the global minibatch."""
    grad_norm: float
    """Global, before clipping."""
    learning_rate: float
    diagnostics: Diagnostics
    """Of all ranks' sequences."""


class NonFiniteLoss(RuntimeError):
    """The loss of a step is NaN or infinite; the weights are those of before the step."""


class ShardedModel:
    """One rank's share of a model."""

    def __init__(self, engine: Any, config: LearnerConfig, rank: int, world_size: int) -> None:
        self.engine = engine
        self.config = config
        self.rank = rank
        self.world_size = world_size
        self.device = torch.device(engine.device)
        self.lay_out: Layout = pack if config.packing else pad
        if config.packing:
            enable_packing(engine.module.model, engine, exact=config.precision == "fp32")
        engine.train()

    @torch.no_grad()
    def evaluate(self, batch: Batch, micro_batches: Sequence[np.ndarray], compute: Compute) -> np.ndarray:
        """Results of all micro-batches, end to end, in their order; empty ones take part and give nothing."""
        results = []
        for indices in micro_batches:
            part = batch.select(indices) if len(indices) else _EMPTY
            result = compute(self.engine, self.lay_out(part, self.device))
            if len(indices):
                results.append(result.float().cpu().numpy())
        return np.concatenate(results) if results else np.zeros(0, dtype=np.float32)

    @torch.no_grad()
    def measure(self, batch: Batch, micro_batches: Sequence[np.ndarray], objective: Objective) -> Diagnostics:
        """The diagnostics of an objective over all ranks' sequences, without a step."""
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
        """One optimizer step over a minibatch.

        Raises:
            NonFiniteLoss: on all ranks, if the loss of any is not finite.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        parts: list[Diagnostics] = []
        for number, indices in enumerate(micro_batches):
            self.engine.set_gradient_accumulation_boundary(number == len(micro_batches) - 1)
            part = batch.select(indices) if len(indices) else _empty_like(batch)
            loss, diagnostics = objective(self.engine, self.lay_out(part, self.device), part)
            # DeepSpeed averages gradients over ranks; the weights already are global, so undo the mean.
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

    def weight_shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Name and full shape of every parameter, in the order of `named_weights`."""
        parameters = self.engine.module.model.named_parameters()
        return [(name, tuple(getattr(p, "ds_shape", p.shape))) for name, p in parameters]

    def save_pretrained(self, folder: Path, tokenizer_from: str) -> None:
        """Write a Hugging Face folder from rank 0; all ranks take part in the gathering."""
        weights = self.named_weights(bucket_bytes=1 << 30)
        if self.rank == 0:
            kept = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in weights}
            save_pretrained(self.engine.module.model, kept, folder, tokenizer_from)
        else:
            for _ in weights:
                pass

    def _over_ranks(self, diagnostics: Diagnostics | None) -> Diagnostics:
        """Add up; a rank without sequences gives None."""
        if self.world_size == 1:
            return diagnostics.cpu()
        gathered: list[Diagnostics | None] = [None] * self.world_size
        torch.distributed.all_gather_object(gathered, None if diagnostics is None else diagnostics.cpu())
        return functools.reduce(operator.add, (part for part in gathered if part is not None))

    def _clip(self) -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_(self.engine.module.parameters(), self.config.optimizer.max_grad_norm)

    def _vote(self, loss: torch.Tensor) -> None:
        """Sum the loss over ranks in place; refuse the step everywhere if it is not finite anywhere."""
        if self.world_size > 1:
            torch.distributed.all_reduce(loss)
        if not torch.isfinite(loss):
            self.engine.zero_grad()
            raise NonFiniteLoss(
                f"the loss is {loss.item()}, so the step was refused and the weights are those of before it; look for "
                "non-finite rewards or advantages in the last metrics, or lower optimizer.learning_rate"
            )

    def named_weights(self, bucket_bytes: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Hugging Face name and full tensor of every parameter; under ZeRO 3 gathered a bucket at a time, on all ranks."""
        import deepspeed

        module = self.engine.module.model
        for chunk in _chunks(list(module.named_parameters()), bucket_bytes):
            sharded = [p for _, p in chunk if hasattr(p, "ds_id")]
            with deepspeed.zero.GatheredParameters(sharded, modifier_rank=None):
                for name, parameter in chunk:
                    yield name, parameter.detach()


_EMPTY = Batch(np.zeros(4, dtype=np.int32), np.asarray([2, 2]), np.asarray([False, True, False, True]))
"""A pair of the shortest sequences with a target: what a rank computes when it has nothing to do."""


def _empty_like(batch: Batch) -> Batch:
    """`_EMPTY` with the batch's columns, all zero: it takes part in collectives and contributes nothing."""
    present = {name: np.zeros(2, dtype=np.float32) for name in TARGET_COLUMNS if getattr(batch, name) is not None}
    labels = None if batch.labels is None else np.zeros((2, batch.labels.shape[1]), dtype=np.float32)
    starts = None if batch.element_starts is None else np.asarray([True, False])
    return replace(_EMPTY.with_columns(**present), labels=labels, element_starts=starts)


def _chunks(parameters: list[tuple[str, nn.Parameter]], bucket_bytes: int) -> Iterator[list[tuple[str, nn.Parameter]]]:
    chunk: list[tuple[str, nn.Parameter]] = []
    size = 0
    for name, parameter in parameters:
        size_of = getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
        if chunk and size + size_of > bucket_bytes:
            yield chunk
            chunk, size = [], 0
        chunk.append((name, parameter))
        size += size_of
    if chunk:
        yield chunk
