"""Thin modules over Hugging Face models that compute only what a loss reads.

Invariants: attention is causal, and sequences are padded on the right or packed with separate attention (`models.packing`), so no
mask is passed, and neither padding nor other sequences change a real token; logits and values are computed at target positions
only, never for prompts or padding; dropout is off (loading sets the config's dropouts to 0).
"""

from __future__ import annotations

import torch
from torch import nn

from rlhf_ray.algorithms.distillation import reverse_kl
from rlhf_ray.algorithms.logprobs import token_logprobs_and_entropy
from rlhf_ray.batch import ModelInput
from rlhf_ray.models.packing import boundaries

_LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


class TokenLogprobs(nn.Module):
    """A causal language model that returns the log-probabilities of a batch's targets."""

    def __init__(self, model: nn.Module, temperature: float = 1.0) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature
        _check_logits(model)

    def forward(
        self, batch: ModelInput, entropy: bool = False, teacher_logits: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, ...]:
        """Log-probabilities of the targets at `temperature`, and their entropies if requested: float32 [m], in nats.

        With a teacher's logits [m, V'] the third result is the KL of each target's distribution from the teacher's, at the same
        temperature: float32 [m].
        """
        logits = _target_logits(self.model, batch)
        result = token_logprobs_and_entropy(logits, batch.targets, self.temperature, with_entropy=entropy)
        if teacher_logits is None:
            return result
        return *result, reverse_kl(logits, teacher_logits, self.temperature)


class TargetLogits(nn.Module):
    """A causal language model that returns the logits before a batch's targets, [m, V]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        _check_logits(model)

    def forward(self, batch: ModelInput) -> torch.Tensor:
        """Logits [m, V] in the model's dtype, before the temperature is applied."""
        return _target_logits(self.model, batch)


class TokenValues(nn.Module):
    """A scalar head over a backbone: the value of the state before each target."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: ModelInput) -> torch.Tensor:
        """Values: float32 [m]."""
        return self.model.score(_states(self.model, batch)[batch.positions]).squeeze(-1).float()


class SequenceScores(nn.Module):
    """A reward model: a head of one or several rows, read at the last token of each sequence."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: ModelInput) -> torch.Tensor:
        """Scores, not normalised: float32 [b, rows of the head]."""
        return self.model.score(_states(self.model, batch)[batch.last]).float()


def _check_logits(model: nn.Module) -> None:
    transformed = [name for name in _LOGIT_TRANSFORMS if getattr(model.config, name, None) not in (None, 1.0)]
    if transformed:
        raise ValueError(
            f"model type {model.config.model_type!r} transforms its logits ({', '.join(transformed)}), which the learners do not "
            "support; use a model that does not (Llama, Qwen, Mistral, …)"
        )


def _target_logits(model: nn.Module, batch: ModelInput) -> torch.Tensor:
    return model.get_output_embeddings()(_states(model, batch)[batch.positions])


def _states(model: nn.Module, batch: ModelInput) -> torch.Tensor:
    """Final hidden states, flattened to [r·L, d]."""
    hidden = model.base_model(input_ids=batch.input_ids, use_cache=False, **boundaries(model, batch)).last_hidden_state
    return hidden.reshape(-1, hidden.shape[-1])
