"""PPO-ptx (InstructGPT): the policy's optimizer steps also learn from demonstrations. Demonstrations for the discriminator.

Invariants: the demonstrations of a step depend only on the seed and the number of the step, so a resumed run continues in the
same order; every epoch visits each demonstration once; demonstrations have no part in the policy loss, and rollouts none in
the cross-entropy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_ray.batch import Batch, pack_sequences
from rlhf_ray.config.ppo import PpoConfig
from rlhf_ray.config.run import RunConfig
from rlhf_ray.data.datasets import Note, Split, dialogue_limit, fitting
from rlhf_ray.data.rows import DataError
from rlhf_ray.data.tokenize import Dialogue, encode_demonstrations
from rlhf_ray.driver.hooks import LoopHook


class DemonstrationSource:
    """An endless, addressable sequence of demonstrations."""

    def __init__(self, demonstrations: Batch, seed: int) -> None:
        """`demonstrations`: at least one sequence."""
        self.demonstrations, self.seed = demonstrations, seed

    def take(self, start: int, count: int) -> Batch:
        """Demonstrations `start` to `start + count − 1` of the endless sequence."""
        epochs, places = np.divmod(np.arange(start, start + count), len(self.demonstrations))
        orders = {epoch: self._order(int(epoch)) for epoch in np.unique(epochs)}
        return self.demonstrations.select([orders[epoch][place] for epoch, place in zip(epochs, places, strict=True)])

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch, len(self.demonstrations)]).permutation(len(self.demonstrations))


class Ptx(LoopHook):
    """Adds demonstrations to every minibatch of the policy."""

    def __init__(self, config: PpoConfig, demonstrations: DemonstrationSource) -> None:
        """`demonstrations`: whole dialogues with the assistant's tokens as targets."""
        assert config.algorithm.ptx is not None
        self.coefficient, self.demonstrations = config.algorithm.ptx.coefficient, demonstrations
        self.count = demonstrations_per_step(config.algorithm.ptx.share, config.batch_size // config.minibatches)

    def extend_minibatch(self, minibatch: Batch, optimizer_steps_done: int) -> Batch:
        """The minibatch and the demonstrations of this optimizer step."""
        demonstrations = self.demonstrations.take(optimizer_steps_done * self.count, self.count)
        return with_demonstrations(minibatch, demonstrations, self.coefficient)


def demonstrations_per_step(share: float, rollouts: int) -> int:
    """Demonstrations of an optimizer step with that many rollouts, at least one."""
    return max(1, round(share * rollouts))


def with_demonstrations(minibatch: Batch, demonstrations: Batch, coefficient: float) -> Batch:
    """Rollouts and demonstrations in one batch.

    The loss is `Σ weights · policy loss + Σ ptx_weights · cross-entropy`; the `ptx_weights` add up to the coefficient γ.
    """
    rollout_tokens, tokens = int(minibatch.target_mask.sum()), int(demonstrations.target_mask.sum())
    own = minibatch.with_columns(ptx_weights=np.zeros(rollout_tokens, dtype=np.float32))
    return own.joined(demonstrations.with_columns(ptx_weights=np.full(tokens, coefficient / tokens, dtype=np.float32)))


def training_dialogues(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, data: Split, note: Note
) -> tuple[Dialogue, ...]:
    """The training dialogues that are not too long."""
    limit = dialogue_limit(config.data)
    return fitting(encode_demonstrations(tokenizer, data.train, limit), "demonstrations", limit, note)


def whole_dialogues(dialogues: Sequence[Dialogue], seed: int) -> DemonstrationSource:
    """Demonstrations for PTX: whole dialogues, with the assistant's tokens as targets."""
    batch = pack_sequences([item.token_ids for item in dialogues], [item.loss_mask for item in dialogues])
    return DemonstrationSource(batch, seed)


def rollout_like_dialogues(dialogues: Sequence[Dialogue], config: RunConfig, note: Note) -> DemonstrationSource:
    """Demonstrations for the discriminator: they end with the last token of the last answer, which is their only target.

    Text that a template adds after an answer, or a length that no rollout can have, would reveal a demonstration.

    Raises:
        DataError: all are longer than rollouts can be.
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
    """The dialogue up to the end of its last answer, and where that answer begins."""
    end = int(np.flatnonzero(dialogue.loss_mask)[-1]) + 1
    before = np.flatnonzero(~dialogue.loss_mask[:end])
    return dialogue.token_ids[:end], int(before[-1]) + 1 if len(before) else 0
