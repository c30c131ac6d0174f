"""The SFT stage, and the base model that every stage starts from. A step is skipped if its folder exists."""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from rlhf_ray.algorithms.diagnostics import Diagnostics
from rlhf_ray.batch import Batch, ModelInput, pack_sequences
from rlhf_ray.config.run import RunConfig
from rlhf_ray.data.datasets import Datasets, Note, Split, dialogue_limit, fitting
from rlhf_ray.data.tokenize import Dialogue, encode_demonstrations
from rlhf_ray.learner.objectives import language_objective
from rlhf_ray.models.heads import TokenLogprobs
from rlhf_ray.models.loading import Dtype, load_causal_lm, load_tokenizer, local_folder
from rlhf_ray.models.tiny import build_tiny_model
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.runtime.stopping import StopRequest
from rlhf_ray.stages.supervised import run_supervised
from rlhf_ray.stages.supervised_job import FitState, SupervisedJob, Task


def base_model(config: RunConfig, folder: RunFolder, data: Datasets) -> str:
    """The folder of the model that all stages start from. A tiny model is built first if the config asks for one."""
    if config.model.path is not None:
        return local_folder(config.model.path)
    assert config.model.build is not None
    base = folder.path / "base"
    if not base.is_dir():
        build_tiny_model(base, data.texts, seed=config.seed, **config.model.build.model_dump())
    return str(base)


def run_sft(
    config: RunConfig, folder: RunFolder, model: str, data: Split, note: Note, stop: StopRequest | None = None
) -> FitState:
    """Fine-tune on demonstrations. The loss covers the assistant's turns."""
    tokenizer, limit = load_tokenizer(model), dialogue_limit(config.data)
    train, held_out = (
        _dialogues(fitting(encode_demonstrations(tokenizer, records, limit), "demonstrations", limit, note))
        for records in (data.train, data.held_out)
    )
    job = SupervisedJob("sft", folder, model, config.sft, LanguageTask(), config.seed, wandb=config.telemetry.wandb)
    return run_supervised(job, train, held_out, stop)


class LanguageTask(Task):
    """Supervised fine-tuning: cross-entropy, with the same weight for every target token."""

    def load(self, model: str, dtype: Dtype, attention: str, seed: int) -> nn.Module:
        return TokenLogprobs(load_causal_lm(model, dtype, attention))

    def objective(self, model: nn.Module, inputs: ModelInput, batch: Batch) -> tuple[Tensor, Diagnostics]:
        return language_objective(model, inputs, batch)


def _dialogues(items: tuple[Dialogue, ...]) -> Batch:
    batch = pack_sequences([item.token_ids for item in items], [item.loss_mask for item in items])
    return batch.with_columns(weights=np.ones(int(batch.target_mask.sum()), dtype=np.float32))
