"""The model that everything starts from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rlhf_ray.config.section import Section


class BuildConfig(Section):
    """A small random model and its own BPE tokenizer, made from the demonstrations: needs no download."""

    architecture: Literal["qwen2", "llama"] = "qwen2"
    """Architecture of transformers and vLLM."""
    vocab_size: int = Field(512, ge=300)
    """Tokens of the tokenizer; 256 are bytes."""
    hidden_size: int = Field(128, ge=8)
    """Width."""
    intermediate_size: int | None = Field(None, ge=8)
    """Width of the MLPs; None: a multiple of `hidden_size`."""
    layers: int = Field(4, ge=1)
    """Depth."""
    heads: int = Field(4, ge=1)
    """Attention heads; must divide `hidden_size`."""
    kv_heads: int = Field(2, ge=1)
    """Key/value heads; must divide `heads`."""
    max_positions: int = Field(512, ge=16)
    """Context length in tokens."""

    @model_validator(mode="after")
    def _heads_divide(self) -> BuildConfig:
        if self.hidden_size % self.heads or self.heads % self.kv_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of heads {self.heads}, and heads of kv_heads {self.kv_heads}"
            )
        if (self.hidden_size // self.heads) % 32:
            raise ValueError(
                f"hidden_size / heads is {self.hidden_size // self.heads}; vLLM's CPU attention needs a multiple of 32"
            )
        return self


class ModelConfig(Section):
    """Exactly one of `path` and `build`."""

    path: str | None = None
    """A Hugging Face folder (safetensors), or a hub name where there is network."""
    build: BuildConfig | None = None
    """Build a small model instead."""

    @model_validator(mode="after")
    def _one_of(self) -> ModelConfig:
        if (self.path is None) == (self.build is None):
            raise ValueError(
                "set exactly one of model.path (a Hugging Face folder) and model.build (a small random model)"
            )
        return self
