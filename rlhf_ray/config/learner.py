"""Learners: optimizer, precision, DeepSpeed sharding, micro-batches."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from rlhf_ray.config.section import Section, Workers, check_packing, micro_batch_budget


class LoraConfig(Section):
    """Low-rank adapters (arXiv 2106.09685): W stays frozen and alpha/rank · B·A is trained and added to it. B starts at
    zero."""

    rank: int = Field(16, ge=1, le=512)
    """Rows of A and columns of B."""
    alpha: float = Field(32.0, gt=0)
    """The product B·A is scaled by alpha / rank."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Linear layers by the ends of their names, such as `q_proj`. all-linear: every linear layer except the output layer."""
    dropout: float = Field(0.0, ge=0, le=0)
    """Must be 0: with dropout, the learner's log-probabilities would not be those of the policy that sampled."""

    @field_validator("target_modules")
    @classmethod
    def _names_some(cls, value: str | list[str]) -> str | list[str]:
        if not value:
            raise ValueError("target_modules is empty; name linear layers such as q_proj, or use all-linear")
        return value


class OptimizerConfig(Section):
    """AdamW with warm-up."""

    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = Field((0.9, 0.95), strict=False)
    """Adam's averaging coefficients."""
    eps: float = Field(1e-5, gt=0)
    """Adam's epsilon. Papers on RLHF implementation details use 1e-5 (detail 1.22)."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay, applied to matrices only."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps over which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Learning rate after warm-up: constant, or a linear or cosine decay to 0 over the steps of the stage."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this global norm (RLHF implementation details 1.23)."""

    @field_validator("betas")
    @classmethod
    def _betas_are_averages(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("both betas must be at least 0 and below 1")
        return betas


class ShardingConfig(Section):
    """What DeepSpeed shards over the ranks, and where it is kept."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage (arXiv 1910.02054). 0: nothing is sharded; 1: optimizer state; 2: also gradients; 3: also
    parameters."""
    offload_optimizer: bool = False
    """Keep the optimizer state in CPU memory and run the optimizer there. For ZeRO 1 to 3 on GPUs."""
    offload_parameters: bool = False
    """Keep sharded parameters in CPU memory. For ZeRO 3 on GPUs."""

    @model_validator(mode="after")
    def _offload_needs_sharding(self) -> ShardingConfig:
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3; it is 0")
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError(f"offload_parameters needs zero_stage 3; it is {self.zero_stage}")
        return self


class LearnerConfig(Section):
    """A group of DeepSpeed ranks that trains one model."""

    workers: Workers = Workers(cpus=0.25)
    """Number of ranks and what each reserves."""
    precision: Literal["fp32", "bf16", "autocast"] = "fp32"
    """fp32: everything in fp32. bf16: bf16 weights with fp32 master weights. autocast: fp32 weights with bf16 matrix
    products."""
    sharding: ShardingConfig = ShardingConfig()
    """DeepSpeed ZeRO."""
    lora: LoraConfig | None = None
    """Train adapters only; null: train all weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass. This takes less memory and about a third more arithmetic."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention kernel of transformers. flash_attention_2 needs the package flash-attn and a GPU."""
    packing: bool = True
    """Put sequences end to end in one row, instead of one padded row for each sequence. The results are the same."""
    micro_batch_tokens: int = Field(default_factory=micro_batch_budget, ge=1)
    """Tokens of one forward pass, including padding. The loss does not depend on it. The default is 8192 on a GPU, and 1024
    on a CPU, whose cache holds no more."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and learning-rate schedule."""

    @model_validator(mode="after")
    def _one_gpu_per_rank(self) -> LearnerConfig:
        if self.workers.gpus > 1:
            raise ValueError(f"workers.gpus is {self.workers.gpus:g}; a rank uses one GPU: raise workers.count instead")
        if self.attention == "flash_attention_2" and self.workers.gpus == 0:
            raise ValueError("attention flash_attention_2 runs on GPUs only and workers.gpus is 0; use sdpa")
        return self

    @model_validator(mode="after")
    def _attention_can_pack(self) -> LearnerConfig:
        check_packing(self.packing, self.attention)
        return self

    @model_validator(mode="after")
    def _offload_needs_gpu(self) -> LearnerConfig:
        if (self.sharding.offload_optimizer or self.sharding.offload_parameters) and self.workers.gpus == 0:
            raise ValueError(
                "offload moves state from GPU to CPU memory; workers.gpus is 0, so there is nothing to move"
            )
        return self
