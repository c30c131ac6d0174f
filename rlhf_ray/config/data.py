"""What a run starts from: its model, and the sources of demonstrations, feedback and prompts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rlhf_ray.config.section import Section
from rlhf_ray.data.formats import Format

SOURCES = ("demonstrations", "pairs", "rankings", "scores", "edits", "prompts")
"""The sections of `data` that each name a source."""


class SourceConfig(Section):
    """A file, or a data set of a hub."""

    location: str
    """Path of a JSONL, CSV or Parquet file, relative to the working directory; or a hub name where there is network,
    or the folder of such a data set."""
    format: Format = "auto"
    """How a row says what it says (`rlhf_ray.data.formats`); auto: by the first row's keys."""
    split: str = "train"
    """Split of a hub data set."""
    subset: str | None = None
    """Subset of a hub data set that has several, such as `main` of openai/gsm8k."""
    limit: int | None = Field(None, ge=1)
    """Read only the first so many records."""


class SimulateConfig(Section):
    """Simulated annotators with a hidden, known utility (`rlhf_ray.data.simulator`). Numbers of records."""

    demonstrations: int = Field(2000, ge=1)
    """Dialogues for SFT."""
    pairs: int = Field(3000, ge=1)
    """Choices for the reward model."""
    held_out_pairs: int = Field(600, ge=1)
    """Choices on which its accuracy is measured."""
    prompts: int = Field(2000, ge=1)
    """Prompts for PPO."""
    held_out_prompts: int = Field(256, ge=1)
    """Prompts for evaluation."""
    rankings: int = Field(200, ge=1)
    """Orders of three to five answers, for a reward model of kind rankings."""
    scores: int = Field(200, ge=1)
    """Marks, overall and by aspect, for one of kind scores."""
    edits: int = Field(200, ge=1)
    """Corrections, which one of kind pairs learns from beside the pairs."""


class DataConfig(Section):
    """Sources, limits and what to do with bad lines."""

    simulate: SimulateConfig | None = None
    """Simulate annotators instead of reading files; excludes the sources below."""
    demonstrations: SourceConfig | None = None
    """Dialogues for SFT (of pairs: the chosen side)."""
    pairs: SourceConfig | None = None
    """Choices for the reward model."""
    rankings: SourceConfig | None = None
    """Orders of several answers, for the reward model of kind rankings."""
    scores: SourceConfig | None = None
    """Marks, for the reward model of kind scores."""
    edits: SourceConfig | None = None
    """Corrected answers, for the reward model of kind pairs: the edited one is better."""
    prompts: SourceConfig | None = None
    """Prompts for PPO and evaluation (of dialogues: without the last answer)."""
    held_out_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of each source kept from training, chosen by a hash of the prompt."""
    max_prompt_tokens: int = Field(256, ge=1)
    """Most tokens of a prompt; see `too_long`."""
    max_dialogue_tokens: int = Field(512, ge=2)
    """Most tokens of a demonstration, or of a prompt with an answer to it that somebody judged; see `too_long`."""
    too_long: Literal["drop", "truncate", "fail"] = "drop"
    """What has more tokens is left out, loses its oldest turns (prompts and demonstrations; feedback is left out, too), or ends
    the run before it starts; always counted, and answers are never cut."""
    on_malformed: Literal["fail", "quarantine"] = "fail"
    """A line that cannot be read ends the run before it starts, or is put aside with its number and reason."""

    @model_validator(mode="after")
    def _simulate_or_sources(self) -> DataConfig:
        named = [name for name in SOURCES if getattr(self, name) is not None]
        if self.simulate is not None and named:
            raise ValueError(f"data.simulate makes its own data; remove data.{', data.'.join(named)} or data.simulate")
        return self


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
