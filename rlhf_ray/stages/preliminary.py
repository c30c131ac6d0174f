"""From the config's model to a reward model: the stages before PPO. Each is skipped where its folder is there already."""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_ray.batch import Batch, pack_sequences
from rlhf_ray.config.run import RunConfig
from rlhf_ray.data.tokenize import Dialogue, DialoguePair, encode_demonstrations, encode_pairs
from rlhf_ray.models.loading import load_tokenizer, local_folder
from rlhf_ray.models.tiny import build_tiny_model
from rlhf_ray.stages.datasets import Datasets, Note, Split, fitting
from rlhf_ray.stages.supervised import SupervisedJob, run_supervised
from rlhf_ray.telemetry.run_folder import RunFolder


def base_model(config: RunConfig, folder: RunFolder, data: Datasets) -> str:
    """The folder of the model that everything starts from; built first where the config says so."""
    if config.model.path is not None:
        return local_folder(config.model.path)
    base = folder.path / "base"
    if not base.is_dir():
        build_tiny_model(base, data.texts, seed=config.seed, **config.model.build.model_dump())
    return str(base)


def run_sft(config: RunConfig, folder: RunFolder, model: str, data: Split, note: Note) -> None:
    """Fine-tune on demonstrations; the loss is on the assistant's turns."""
    tokenizer, limit = load_tokenizer(model), config.data.max_dialogue_tokens
    batches = [
        _dialogues(fitting(encode_demonstrations(tokenizer, records, limit), "demonstrations", _LIMIT, note))
        for records in (data.train, data.held_out)
    ]
    run_supervised(SupervisedJob("sft", folder, model, config.sft, 0.0, config.seed), *batches)


def run_reward_model(config: RunConfig, folder: RunFolder, model: str, data: Split, note: Note) -> None:
    """Learn a reward from pairs, starting from the fine-tuned policy's backbone."""
    tokenizer, limit = load_tokenizer(model), config.data.max_dialogue_tokens
    batches = [
        pack_pairs(fitting(encode_pairs(tokenizer, records, limit), "pairs", _LIMIT, note), tokenizer)
        for records in (data.train, data.held_out)
    ]
    settings = config.reward_model
    run_supervised(SupervisedJob("reward_model", folder, model, settings, settings.centring, config.seed), *batches)


_LIMIT = "data.max_dialogue_tokens"


def _dialogues(items: tuple[Dialogue, ...]) -> Batch:
    return pack_sequences([item.token_ids for item in items], [item.loss_mask for item in items])


def pack_pairs(items: tuple[DialoguePair, ...], tokenizer: PreTrainedTokenizerBase) -> Batch:
    """Chosen and rejected sequences in turn, each cut behind its last end-of-sequence token, where rollouts end, too.

    The single target of a sequence is its last token; it only carries the pair's weight.
    """
    sequences = [
        _up_to_end(side.token_ids, tokenizer.eos_token_id) for item in items for side in (item.chosen, item.rejected)
    ]
    return pack_sequences(sequences, [np.arange(len(s)) == len(s) - 1 for s in sequences])


def _up_to_end(token_ids: np.ndarray, eos: int) -> np.ndarray:
    ends = np.flatnonzero(token_ids == eos)
    return token_ids[: ends[-1] + 1] if len(ends) else token_ids
