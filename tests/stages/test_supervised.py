"""The supervised loop on Ray Train: a rank that is killed, going on bit by bit, stopping early, the best model."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from rlhf_ray.batch import pack_sequences
from rlhf_ray.config.learner import LearnerConfig
from rlhf_ray.config.supervised import EarlyStoppingConfig, SupervisedConfig
from rlhf_ray.stages.preliminary import LanguageTask
from rlhf_ray.stages.supervised import SupervisedJob, run_supervised
from rlhf_ray.stages.supervised_loop import run_rank
from rlhf_ray.telemetry.metrics import read_metrics
from rlhf_ray.telemetry.run_folder import RunFolder


def dialogues(count: int, seed: int, words: tuple[int, int] = (3, 60)):
    """Ragged sequences of a few tokens, all of them learned but the first."""
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


def test_a_stage_goes_on_where_a_killed_rank_left_it(ray_cluster, tiny_model, tmp_path):
    ranks, stage = 2, 2
    train, held_out = dialogues(24, 0), dialogues(6, 1)
    whole = run_supervised(job(tmp_path / "whole", tiny_model, LanguageTask(), ranks, stage), train, held_out)

    class Doomed(LanguageTask):
        """Its last rank kills its own process after the sixth step, once."""

        def __init__(self, mark: Path) -> None:
            self.mark, self.steps = mark, 0

        def observe(self, diagnostics) -> None:
            self.steps += 1
            if self.steps == 6 and not self.mark.exists() and torch.distributed.get_rank() == ranks - 1:
                self.mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)

    killed = job(tmp_path / "killed", tiny_model, Doomed(tmp_path / "mark"), ranks, stage, max_failures=1)
    resumed = run_supervised(killed, train, held_out)
    assert (tmp_path / "mark").exists(), "nothing was killed"
    assert resumed == whole and whole.step == 12
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    records = [read_metrics(tmp_path / name / "sft" / "metrics.jsonl") for name in ("whole", "killed")]
    assert [r["step"] for r in records[0]] == [r["step"] for r in records[1]] == list(range(13))
    assert [r.get("loss") for r in records[0]] == [r.get("loss") for r in records[1]]
    assert not killed.checkpoints.exists()


def test_it_stops_early_and_keeps_the_best(ray_cluster, tiny_model, tmp_path):
    """Held-out words that training never shows: the better it gets, the less it expects them."""
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


def test_a_complete_stage_is_left_alone(tiny_model, tmp_path):
    """Workers that are started again after the model is in place, here without any process group, have nothing to do."""
    complete = job(tmp_path, tiny_model, LanguageTask(), 1, 0)
    (complete.model_folder / "fit.json").write_text("{}")
    run_rank(complete, dialogues(4, 0), dialogues(4, 1), 0, 1)
    assert [path.name for path in complete.model_folder.iterdir()] == ["fit.json"]
