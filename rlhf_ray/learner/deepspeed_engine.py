"""One model under DeepSpeed: configuration, creation, learning rate.

Invariant: DeepSpeed averages gradients over ranks, and the caller scales the loss so that they are sums (see `ShardedModel`).
Accumulation boundaries are set by hand, so each step may have any number of micro-batches.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from rlhf_ray.config.learner import LearnerConfig, OptimizerConfig
from rlhf_ray.models.lora import add_adapters


def prepare_process(threads: int, use_gpu: bool) -> None:
    """Set the environment that DeepSpeed reads when it is imported. Call this first in a learner's process."""
    if not use_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    torch.set_num_threads(threads)


def join_group(rank: int, world_size: int, master: str, port: int, use_gpu: bool) -> None:
    """Join the learner group's torch.distributed world (NCCL on GPUs, gloo on CPUs)."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0", MASTER_ADDR=master, MASTER_PORT=str(port)
    )
    join_initialised(use_gpu)


def join_initialised(use_gpu: bool) -> None:
    """Let DeepSpeed join the torch.distributed world that the environment describes, or that Ray Train has created."""
    import deepspeed

    deepspeed.utils.logger.setLevel("ERROR")
    if not use_gpu:
        # Nothing here calls this all-reduce for CPU inference. Compiling it takes a minute and needs the Python headers.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if use_gpu else "gloo", verbose=False)


def deepspeed_config(config: LearnerConfig) -> dict[str, Any]:
    """The DeepSpeed config of a learner. Its batch sizes are nominal, because this package plans the micro-batches."""
    sharding = config.sharding
    zero: dict[str, Any] = {"stage": sharding.zero_stage}
    if sharding.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if sharding.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # In unsharded fp32 training DeepSpeed clips without returning the norm, so `ShardedModel` clips instead.
        "gradient_clipping": 0.0 if clips_itself(config) else config.optimizer.max_grad_norm,
        "bf16": {"enabled": config.precision == "bf16"},
        "steps_per_print": 1 << 62,
    }
    if config.precision == "autocast":
        result["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return result


def clips_itself(config: LearnerConfig) -> bool:
    """Whether `ShardedModel` clips with PyTorch, because gradients are complete tensors after the backward pass."""
    return config.sharding.zero_stage == 0 and config.precision != "bf16"


def build(load: Callable[[], nn.Module], config: LearnerConfig, seed: int = 0) -> Any:
    """Load a model, sharded while it loads under ZeRO 3, add the configured adapters, and wrap it in a DeepSpeed engine."""
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    settings = deepspeed_config(config)
    keep_alive = HfDeepSpeedConfig(settings) if config.sharding.zero_stage == 3 else None
    module = load()
    if config.lora is not None:
        add_adapters(module.model, config.lora, seed)
    del keep_alive
    if config.gradient_checkpointing:
        module.model.gradient_checkpointing_enable({"use_reentrant": False})
        module.train()
    engine, *_ = deepspeed.initialize(model=module, optimizer=_optimizer(module, config), config=settings)
    return engine


def _optimizer(module: nn.Module, config: LearnerConfig) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only. Offloaded optimizer state needs DeepSpeed's CPU kernel."""
    settings = config.optimizer
    groups = [
        {"params": [p for p in _trained(module) if _ndim(p) >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in _trained(module) if _ndim(p) < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    options = {"lr": settings.learning_rate, "betas": settings.betas, "eps": settings.eps}
    if config.sharding.offload_optimizer:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    return torch.optim.AdamW(groups, fused=config.sharding.zero_stage < 3, **options)


def _trained(module: nn.Module) -> Iterator[nn.Parameter]:
    return (p for p in module.parameters() if p.requires_grad)


def _ndim(parameter: nn.Parameter) -> int:
    """The number of dimensions of the whole parameter. (A ZeRO-3 shard is flat.)"""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """The learning rate of optimizer step `step` (from 0) of `total_steps`: linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    factor = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[config.schedule]
    return config.learning_rate * factor
