"""Demonstrations in the PPO stage: whole dialogues to learn from beside the rollouts, and answers to tell rollouts from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_ray.batch import pack_sequences
from rlhf_ray.config.run import RunConfig
from rlhf_ray.data.datasets import Note, Split, dialogue_limit, fitting
from rlhf_ray.data.readers import DataError
from rlhf_ray.data.tokenize import Dialogue, encode_demonstrations
from rlhf_ray.driver.extras.ptx import DemonstrationSource


def encoded(config: RunConfig, tokenizer: PreTrainedTokenizerBase, data: Split, note: Note) -> tuple[Dialogue, ...]:
    """The training dialogues that fit."""
    limit = dialogue_limit(config.data)
    return fitting(encode_demonstrations(tokenizer, data.train, limit), "demonstrations", limit, note)


def to_learn_from(dialogues: Sequence[Dialogue], seed: int) -> DemonstrationSource:
    """Whole dialogues; the targets are the assistant's tokens."""
    batch = pack_sequences([item.token_ids for item in dialogues], [item.loss_mask for item in dialogues])
    return DemonstrationSource(batch, seed)


def to_tell_apart(dialogues: Sequence[Dialogue], config: RunConfig, note: Note) -> DemonstrationSource:
    """Dialogues that look like rollouts: they end with the last answer's last token, their only target, and are no longer.

    What a template writes behind an answer, or a length that no rollout can have, would give a demonstration away.

    Raises:
        DataError: all are longer.
    """
    longest_prompt, longest_answer = config.data.max_prompt_tokens, config.ppo.rollout.sampling.max_new_tokens
    answers = [_last_answer(dialogue) for dialogue in dialogues]
    kept = [ids for ids, start in answers if start <= longest_prompt and len(ids) - start <= longest_answer]
    limits = f"data.max_prompt_tokens {longest_prompt} or ppo.rollout.sampling.max_new_tokens {longest_answer}"
    if not kept:
        raise DataError(
            f"all {len(dialogues)} demonstrations are longer than rollouts can be, by {limits}; raise the limit, or use "
            "shorter demonstrations"
        )
    if len(kept) < len(dialogues):
        left_out = len(dialogues) - len(kept)
        note(f"{left_out} of {len(dialogues)} demonstrations exceed {limits}; the discriminator does not see them")
    return DemonstrationSource(pack_sequences(kept, [np.arange(len(ids)) == len(ids) - 1 for ids in kept]), config.seed)


def _last_answer(dialogue: Dialogue) -> tuple[np.ndarray, int]:
    """The dialogue up to the end of its last answer, and where that begins."""
    end = int(np.flatnonzero(dialogue.loss_mask)[-1]) + 1
    before = np.flatnonzero(~dialogue.loss_mask[:end])
    return dialogue.token_ids[:end], int(before[-1]) + 1 if len(before) else 0
