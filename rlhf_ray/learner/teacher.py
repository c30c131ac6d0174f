"""A frozen teacher in each rank of the policy learner: it reads the same micro-batches and has no gradients and no optimizer.

Invariant: under ZeRO 3 the teacher's weights are sharded like the policy's, and its forward passes are collective. All ranks make
one for each micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from rlhf_ray.batch import ModelInput
from rlhf_ray.config.learner import LearnerConfig
from rlhf_ray.config.teacher import TeacherConfig
from rlhf_ray.models.heads import TargetLogits
from rlhf_ray.models.loading import load_causal_lm
from rlhf_ray.models.packing import enable_packing


class FrozenTeacher:
    """A teacher model, and the coefficient of the KL divergence from it in the loss."""

    def __init__(self, model: Callable[[ModelInput], torch.Tensor], coefficient: float) -> None:
        """`model`: returns logits [m, V'] for a micro-batch of m targets."""
        self.model, self.coefficient = model, coefficient

    @torch.no_grad()
    def logits(self, inputs: ModelInput) -> torch.Tensor:
        """The logits at the targets, [m, V'], before the temperature is applied."""
        return self.model(inputs)


def load_teacher(config: TeacherConfig, learner: LearnerConfig, device: torch.device) -> FrozenTeacher:
    """Load one rank's teacher: the whole model, or a shard under ZeRO 3."""

    def load() -> nn.Module:
        model = load_causal_lm(config.model, config.dtype, config.attention)
        return TargetLogits(model).eval().requires_grad_(False)

    model = load().to(device) if learner.sharding.zero_stage < 3 else _sharded(load, config, learner)
    if learner.packing:  # the teacher reads the policy's micro-batches
        enable_packing(getattr(model, "module", model).model, model, exact=config.dtype == "fp32")
    return FrozenTeacher(model, config.coefficient)


def _sharded(load: Callable[[], nn.Module], config: TeacherConfig, learner: LearnerConfig) -> Any:
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    zero: dict[str, Any] = {"stage": 3}
    if learner.sharding.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": config.dtype == "bf16"},
        "steps_per_print": 1 << 62,
    }
    keep_alive = HfDeepSpeedConfig(settings)
    module = load()
    del keep_alive
    engine, *_ = deepspeed.initialize(model=module, config=settings)
    engine.eval()
    return engine
