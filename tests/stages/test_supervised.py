"""The supervised loop on Ray Train: killed ranks, bit-exact resuming, early stopping, the best model."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rlhf_ray.batch import pack_sequences
from rlhf_ray.config.learner import LearnerConfig
from rlhf_ray.config.supervised import EarlyStoppingConfig, SupervisedConfig
from rlhf_ray.runs.metrics import read_metrics
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.runtime.stopping import RunStopped, stop_on_sigterm
from rlhf_ray.stages.sft import LanguageTask
from rlhf_ray.stages.supervised import run_supervised
from rlhf_ray.stages.supervised_job import SupervisedJob
from rlhf_ray.stages.supervised_loop import run_rank


def dialogues(count: int, seed: int, words: tuple[int, int] = (3, 60)):
    """Short sequences of different lengths. All tokens but the first are targets."""
    generator = np.random.default_rng(seed)
    sequences = [generator.integers(*words, generator.integers(4, 24), dtype=np.int32) for _ in range(count)]
    batch = pack_sequences(sequences, [np.arange(len(s)) > 0 for s in sequences])
    return batch.with_columns(weights=np.ones(int(batch.target_mask.sum()), dtype=np.float32))


def job(folder: Path, model: Path, task, ranks: int, stage: int, **settings) -> SupervisedJob:
    learner = LearnerConfig.model_validate(
        {"workers": {"count": ranks}, "sharding": {"zero_stage": stage}, "optimizer": {"learning_rate": 5e-3}}
    )
    config = SupervisedConfig(
        epochs=2, batch_size=4, learner=learner, **{"evaluate_every": 5, "checkpoint_every": 4, **settings}
    )
    (folder / "sft").mkdir(parents=True, exist_ok=True)
    return SupervisedJob("sft", RunFolder(folder), str(model), config, task, seed=3)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "sft" / "model.safetensors")


RANKS, ZERO_STAGE = 2, 2


@pytest.fixture(scope="module")
def whole(ray_cluster, tiny_model, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    run_supervised(job(folder, tiny_model, LanguageTask(), RANKS, ZERO_STAGE), dialogues(24, 0), dialogues(6, 1))
    return folder


def check_same(whole: Path, other: Path) -> None:
    """Check that both runs have bit-identical weights and the same records."""
    assert (other / "sft" / "fit.json").read_text() == (whole / "sft" / "fit.json").read_text()
    one, two = weights(whole), weights(other)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    records = [read_metrics(folder / "sft" / "metrics.jsonl") for folder in (whole, other)]
    assert [r["step"] for r in records[0]] == [r["step"] for r in records[1]] == list(range(13))
    assert [r.get("loss") for r in records[0]] == [r.get("loss") for r in records[1]]


def test_a_stopped_stage_saves_a_checkpoint_and_continues_from_it(whole, tiny_model, tmp_path):
    class Asking(LanguageTask):
        """Only the last rank sees the request, in the sixth step. All ranks must stop after the same step."""

        def __init__(self, stop_file: Path) -> None:
            self.stop_file, self.steps = stop_file, 0

        def observe(self, diagnostics) -> None:
            self.steps += 1
            if self.steps == 6 and torch.distributed.get_rank() == RANKS - 1:
                self.stop_file.parent.mkdir(parents=True, exist_ok=True)
                self.stop_file.touch()

    asked = job(tmp_path, tiny_model, LanguageTask(), RANKS, ZERO_STAGE, checkpoint_every=100)
    with stop_on_sigterm() as stop:
        handler = signal.getsignal(signal.SIGTERM)
        with pytest.raises(RunStopped, match="after step 6 of sft"):
            run_supervised(replace(asked, task=Asking(asked.stop_file)), dialogues(24, 0), dialogues(6, 1), stop)
        assert signal.getsignal(signal.SIGTERM) is handler, "Ray Train replaced the handler"
    assert (asked.checkpoints / "step_6" / "fit.json").is_file() and not (tmp_path / "sft" / "fit.json").exists()
    run_supervised(asked, dialogues(24, 0), dialogues(6, 1))
    check_same(whole, tmp_path)


def test_a_stage_continues_after_a_rank_is_killed(whole, tiny_model, tmp_path):
    class Doomed(LanguageTask):
        """The last rank kills its own process once, after the sixth step."""

        def __init__(self, mark: Path) -> None:
            self.mark, self.steps = mark, 0

        def observe(self, diagnostics) -> None:
            self.steps += 1
            if self.steps == 6 and not self.mark.exists() and torch.distributed.get_rank() == RANKS - 1:
                self.mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)

    killed = job(tmp_path, tiny_model, Doomed(tmp_path / "mark"), RANKS, ZERO_STAGE, max_failures=1)
    resumed = run_supervised(killed, dialogues(24, 0), dialogues(6, 1))
    assert (tmp_path / "mark").exists(), "nothing was killed"
    assert resumed.step == 12
    check_same(whole, tmp_path)
    assert not killed.checkpoints.exists()


def test_it_stops_early_and_keeps_the_best(ray_cluster, tiny_model, tmp_path):
    """The held-out words are not in the training data, so the held-out loss rises during training."""
    stopping = EarlyStoppingConfig(patience=2)
    settings = {"evaluate_every": 1, "early_stopping": stopping}
    fit = run_supervised(
        job(tmp_path, tiny_model, LanguageTask(), 1, 0, **settings),
        dialogues(24, 0, (3, 30)),
        dialogues(8, 7, (30, 60)),
    )
    records = read_metrics(tmp_path / "sft" / "metrics.jsonl")
    measured = [r["heldout/loss"] for r in records]
    assert fit.stopped and fit.step == records[-1]["step"] < 12
    assert fit.best_loss == min(measured) and measured.index(min(measured)) == fit.best_step == fit.step - 2
    assert json.loads((tmp_path / "sft" / "fit.json").read_text())["best_step"] == fit.best_step


def test_a_complete_stage_is_not_repeated(tiny_model, tmp_path):
    """Workers that restart after the model is saved do nothing, and need no process group."""
    complete = job(tmp_path, tiny_model, LanguageTask(), 1, 0)
    (complete.model_folder / "fit.json").write_text("{}")
    run_rank(complete, dialogues(4, 0), dialogues(4, 1), 0, 1)
    assert [path.name for path in complete.model_folder.iterdir()] == ["fit.json"]
