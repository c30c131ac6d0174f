"""Rollouts as text, as whoever judges them by reading sees them."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from rlhf_ray.types import Rollout


def response_texts(tokenizer: PreTrainedTokenizerBase, rollouts: Sequence[Rollout]) -> list[str]:
    """The responses, without special tokens and without space around them."""
    texts = tokenizer.batch_decode([rollout.token_ids for rollout in rollouts], skip_special_tokens=True)
    return [text.strip() for text in texts]
