"""The learners: optimizer, precision, DeepSpeed sharding, micro-batches."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from rlhf_ray.config.section import Section, Workers, check_packing, micro_batch_budget


class LoraConfig(Section):
    """W stays as it is and alpha/rank · B·A is learned beside it (arXiv 2106.09685); B starts at zero."""

    rank: int = Field(16, ge=1, le=512)
    """Rows of A and columns of B."""
    alpha: float = Field(32.0, gt=0)
    """The product is scaled by alpha / rank."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Linear layers by the ends of their names, such as `q_proj`; `all-linear`: all but the output layer."""
    dropout: float = Field(0.0, ge=0, le=0)
    """None: with it a policy's log-probabilities would not be those of the policy that sampled."""

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
    """Adam's epsilon (algorithms 1.22; the RLHF details papers use 1e-5)."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay, on matrices only."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps over which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """After warm-up: constant, linear to 0, or cosine to 0, over the stage's steps."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Global gradient norm above which gradients are scaled down (algorithms 1.23)."""

    @field_validator("betas")
    @classmethod
    def _betas_are_averages(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("betas must both be at least 0 and below 1")
        return betas


class ShardingConfig(Section):
    """What DeepSpeed shards over the ranks and where it keeps it."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    """0: nothing; 1: optimizer state; 2: and gradients; 3: and parameters (arXiv 1910.02054)."""
    offload_optimizer: bool = False
    """Keep the optimizer state in CPU memory and step there (ZeRO 1–3 on GPUs)."""
    offload_parameters: bool = False
    """Keep sharded parameters in CPU memory (ZeRO 3 on GPUs)."""

    @model_validator(mode="after")
    def _offload_needs_sharding(self) -> ShardingConfig:
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3; it is 0")
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError(f"offload_parameters needs zero_stage 3; it is {self.zero_stage}")
        return self


class LearnerConfig(Section):
    """One group of DeepSpeed ranks that trains one model."""

    workers: Workers = Workers(cpus=0.25)
    """Ranks and what each reserves."""
    precision: Literal["fp32", "bf16", "autocast"] = "fp32"
    """`fp32`; `bf16` with fp32 master weights; `autocast`: fp32 weights, bf16 matrix products."""
    sharding: ShardingConfig = ShardingConfig()
    """DeepSpeed ZeRO."""
    lora: LoraConfig | None = None
    """Train adapters only; None: all weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more arithmetic."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention kernel of transformers; `flash_attention_2` needs that package and a GPU."""
    packing: bool = True
    """Sequences end to end in one row instead of a row for each, padded to the longest; the same results."""
    micro_batch_tokens: int = Field(default_factory=micro_batch_budget, ge=1)
    """Tokens, padding included, of one forward pass; the loss does not depend on it. 8192 on a GPU, 1024 on a CPU, whose cache
    holds no more."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and schedule."""

    @model_validator(mode="after")
    def _one_gpu_per_rank(self) -> LearnerConfig:
        if self.workers.gpus > 1:
            raise ValueError(f"workers.gpus is {self.workers.gpus:g}; a rank uses one GPU: count is the number of GPUs")
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
