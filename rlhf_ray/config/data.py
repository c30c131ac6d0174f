"""What a run starts from: its model, and the sources of demonstrations, feedback and prompts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rlhf_ray.config.section import Section
from rlhf_ray.data.formats import Format

SOURCES = ("demonstrations", "pairs", "rankings", "scores", "edits", "prompts")
"""The sections of `data` that each name a source."""


class SourceConfig(Section):
    """A file, or a data set of the Hugging Face hub."""

    location: str
    """Path of a JSONL, CSV or Parquet file, relative to the working directory; the folder of a hub data set; or its hub name
    if there is network."""
    format: Format = "auto"
    """How the rows are written (`rlhf_ray.data.formats`). auto: chosen by the keys of the first row."""
    split: str = "train"
    """Split of a hub data set."""
    subset: str | None = None
    """Subset of a hub data set that has several, such as `main` of openai/gsm8k; null: the data set has only one."""
    limit: int | None = Field(None, ge=1)
    """Read only this many records from the start; null: all."""


class SimulateConfig(Section):
    """Simulated annotators with a hidden, known utility (`rlhf_ray.data.simulator`). All values are numbers of records."""

    demonstrations: int = Field(2000, ge=1)
    """Dialogues for SFT."""
    pairs: int = Field(3000, ge=1)
    """Choices between two responses, to train the reward model on."""
    held_out_pairs: int = Field(600, ge=1)
    """Choices on which the accuracy of the reward model is measured."""
    prompts: int = Field(2000, ge=1)
    """Prompts for PPO."""
    held_out_prompts: int = Field(256, ge=1)
    """Prompts for evaluation."""
    rankings: int = Field(200, ge=1)
    """Orders of three to five responses, for a reward model of kind rankings."""
    scores: int = Field(200, ge=1)
    """Ratings, overall and by aspect, for a reward model of kind scores."""
    edits: int = Field(200, ge=1)
    """Corrected responses. A reward model of kind pairs learns from them in addition to the pairs."""


class DataConfig(Section):
    """Sources of data, limits on lengths, and what happens to lines that cannot be read."""

    simulate: SimulateConfig | None = None
    """Simulate annotators instead of reading files; excludes all sources. null: read the sources."""
    demonstrations: SourceConfig | None = None
    """Dialogues for SFT. Of pairs, the chosen response is used."""
    pairs: SourceConfig | None = None
    """Choices between two responses, for a reward model of kind pairs."""
    rankings: SourceConfig | None = None
    """Orders of several responses, for a reward model of kind rankings."""
    scores: SourceConfig | None = None
    """Ratings of single responses, for a reward model of kind scores."""
    edits: SourceConfig | None = None
    """Corrected responses, for a reward model of kind pairs: the edited response is the better one."""
    prompts: SourceConfig | None = None
    """Prompts for PPO and evaluation. Of dialogues, everything before the last response is used."""
    held_out_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of each source that is kept from training, chosen by a hash of the prompt."""
    max_prompt_tokens: int = Field(256, ge=1)
    """Longest prompt, in tokens; `too_long` says what happens to longer ones."""
    max_dialogue_tokens: int = Field(512, ge=2)
    """Longest demonstration, or prompt with a rated response, in tokens; `too_long` says what happens to longer ones."""
    too_long: Literal["drop", "truncate", "fail"] = "drop"
    """drop: leave the record out. truncate: remove the oldest turns of prompts and demonstrations; feedback is left out.
    fail: end the run before it starts. All cases are counted, and responses are never cut."""
    on_malformed: Literal["fail", "quarantine"] = "fail"
    """fail: a line that cannot be read ends the run before it starts. quarantine: it is set aside with its number and the
    reason."""

    @model_validator(mode="after")
    def _simulate_or_sources(self) -> DataConfig:
        named = [name for name in SOURCES if getattr(self, name) is not None]
        if self.simulate is not None and named:
            raise ValueError(f"data.simulate makes its own data; remove data.{', data.'.join(named)} or data.simulate")
        return self


class BuildConfig(Section):
    """A small random model with its own BPE tokenizer, trained on the demonstrations. It needs no download."""

    architecture: Literal["qwen2", "llama"] = "qwen2"
    """Architecture of transformers and vLLM."""
    vocab_size: int = Field(512, ge=300)
    """Tokens in the vocabulary; 256 of them are bytes."""
    hidden_size: int = Field(128, ge=8)
    """Width of the model."""
    intermediate_size: int | None = Field(None, ge=8)
    """Width of the MLPs; null: a multiple of `hidden_size`."""
    layers: int = Field(4, ge=1)
    """Number of transformer layers."""
    heads: int = Field(4, ge=1)
    """Attention heads per layer; must divide `hidden_size`."""
    kv_heads: int = Field(2, ge=1)
    """Key/value heads per layer; must divide `heads`."""
    max_positions: int = Field(512, ge=16)
    """Context length, in tokens."""

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
    """The model that a run starts from: exactly one of `path` and `build`."""

    path: str | None = None
    """A Hugging Face folder with safetensors, or a hub name if there is network; null: use `build`."""
    build: BuildConfig | None = None
    """Build a small random model instead; null: use `path`."""

    @model_validator(mode="after")
    def _one_of(self) -> ModelConfig:
        if (self.path is None) == (self.build is None):
            raise ValueError(
                "set exactly one of model.path (a Hugging Face folder) and model.build (a small random model)"
            )
        return self
