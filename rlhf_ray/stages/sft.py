"""From the config's model to a fine-tuned policy. Each step is skipped where its folder is there already."""

from __future__ import annotations

import numpy as np
from torch import nn

from rlhf_ray.algorithms.diagnostics import Diagnostics
from rlhf_ray.batch import Batch, pack_sequences
from rlhf_ray.config.run import RunConfig
from rlhf_ray.data.datasets import Datasets, Note, Split, dialogue_limit, fitting
from rlhf_ray.data.tokenize import Dialogue, encode_demonstrations
from rlhf_ray.learner.objectives import language_objective
from rlhf_ray.learner.sharded_model import ShardedModel
from rlhf_ray.models.heads import TokenLogprobs
from rlhf_ray.models.loading import load_causal_lm, load_tokenizer, local_folder
from rlhf_ray.models.tiny import build_tiny_model
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.runtime.stopping import StopRequest
from rlhf_ray.stages.supervised import Documents, FitState, SupervisedJob, run_supervised


def base_model(config: RunConfig, folder: RunFolder, data: Datasets) -> str:
    """The folder of the model that everything starts from; built first where the config says so."""
    if config.model.path is not None:
        return local_folder(config.model.path)
    base = folder.path / "base"
    if not base.is_dir():
        build_tiny_model(base, data.texts, seed=config.seed, **config.model.build.model_dump())
    return str(base)


def run_sft(
    config: RunConfig, folder: RunFolder, model: str, data: Split, note: Note, stop: StopRequest | None = None
) -> FitState:
    """Fine-tune on demonstrations; the loss is on the assistant's turns."""
    tokenizer, limit = load_tokenizer(model), dialogue_limit(config.data)
    batches = [
        _dialogues(fitting(encode_demonstrations(tokenizer, records, limit), "demonstrations", limit, note))
        for records in (data.train, data.held_out)
    ]
    job = SupervisedJob(
        "sft", folder, model, config.sft, LanguageTask(), config.seed, wandb=config.telemetry.wandb
    )  # fmt: skip
    return run_supervised(job, *batches, stop)


class LanguageTask:
    """Supervised fine-tuning: cross-entropy, every target token counts the same."""

    objective = staticmethod(language_objective)

    def load(self, model: str, dtype: str, attention: str, seed: int) -> nn.Module:
        """A language model."""
        return TokenLogprobs(load_causal_lm(model, dtype, attention))

    def observe(self, diagnostics: Diagnostics) -> None:
        """Nothing to learn beside the model,"""

    def state(self) -> None:
        """nothing to keep,"""

    def restore(self, state: None) -> None:
        """nothing to go on from,"""

    def finish(self, model: ShardedModel, held_out: Batch, micro_batch_tokens: int) -> Documents:
        """nothing to write."""
        return {}


def _dialogues(items: tuple[Dialogue, ...]) -> Batch:
    batch = pack_sequences([item.token_ids for item in items], [item.loss_mask for item in items])
    return batch.with_columns(weights=np.ones(int(batch.target_mask.sum()), dtype=np.float32))
