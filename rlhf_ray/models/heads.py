"""Thin modules over Hugging Face models that compute only what a loss reads.

Invariants: sequences are right-padded and attention is causal, so no attention mask is passed and padding cannot change a real
token; logits and values exist only at target positions, never for prompts or padding; dropout is off (`model.eval()` behaviour
is forced by zeroing the config's dropouts at loading).
"""

from __future__ import annotations

import torch
from torch import nn

from rlhf_ray.algorithms.logprobs import token_logprobs_and_entropy
from rlhf_ray.batch import PaddedBatch

_LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


class TokenLogprobs(nn.Module):
    """A causal language model that returns the log-probabilities of a batch's targets."""

    def __init__(self, model: nn.Module, temperature: float = 1.0) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature
        transformed = [name for name in _LOGIT_TRANSFORMS if getattr(model.config, name, None) not in (None, 1.0)]
        if transformed:
            raise ValueError(
                f"model type {model.config.model_type!r} transforms its logits ({', '.join(transformed)}), which the "
                "learners do not reproduce; use a model without it (Llama, Qwen, Mistral, …)"
            )

    def forward(self, batch: PaddedBatch, entropy: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """float32 [m] log-probabilities in nats, at `temperature`, and, if asked, float32 [m] entropies without gradient."""
        states = _states(self.model, batch.input_ids)[batch.positions]
        logits = self.model.get_output_embeddings()(states)
        return token_logprobs_and_entropy(logits, batch.targets, self.temperature, with_entropy=entropy)


class TokenValues(nn.Module):
    """A scalar head over a backbone: the value of the state before each target."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: PaddedBatch) -> torch.Tensor:
        """float32 [m]."""
        return self.model.score(_states(self.model, batch.input_ids)[batch.positions]).squeeze(-1).float()


class SequenceScores(nn.Module):
    """The same head, of one or several rows, read at the last token of each sequence: a reward model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: PaddedBatch) -> torch.Tensor:
        """float32 [b, rows of the head], as trained; normalisation is the caller's."""
        return self.model.score(_states(self.model, batch.input_ids)[batch.last]).float()


def _states(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Final hidden states, flattened to [b·L, d]."""
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    return hidden.reshape(-1, hidden.shape[-1])
