"""DAPO's dynamic sampling and InstructGPT's pretraining mix on the real engines, and resuming after an interruption."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rlhf_ray.config import RunConfig, parse_config
from rlhf_ray.driver.checkpointer import TrainingState, load_state
from rlhf_ray.driver.run_logger import NO_SIGNAL, RunLogger
from rlhf_ray.runs.events import read_events
from rlhf_ray.runs.ledger import LedgerEntry, read_ledger
from rlhf_ray.runs.metrics import read_metrics
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.runtime.stopping import RunStopped
from rlhf_ray.stages.run import run

STEPS, GROUPS, SAMPLES, ATTEMPTS = 3, 4, 4, 3
REWARD = """
def fifth(prompts, responses, metadata):
    return [float(len(response) % 5 == 0) for response in responses]
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with prompts, demonstrations and a reward function that often gives a whole group the same reward."""
    folder = tmp_path_factory.mktemp("inputs")
    asked = [{"role": "user", "content": f"Hello, where is my order {number}?"} for number in range(30)]
    answer = {"role": "assistant", "content": "I am sorry. Your order will arrive on Monday."}
    for name, rows in (
        ("prompts", [{"prompt": [question]} for question in asked]),
        ("demonstrations", [{"messages": [question, answer]} for question in asked]),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards_for_groups.py").write_text(REWARD)
    return folder


def config(folder: Path, inputs: Path, model: Path, checkpoint_every: int = 1) -> RunConfig:
    """Three roles: no critic and no reference."""
    workers = {"cpus": 0.1}
    return parse_config(
        {
            "name": "dapo",
            "folder": str(folder),
            "stages": ["ppo"],
            "model": {"path": str(model)},
            "data": {
                "prompts": {"location": str(inputs / "prompts.jsonl")},
                "demonstrations": {"location": str(inputs / "demonstrations.jsonl")},
                "max_prompt_tokens": 80,
                "max_dialogue_tokens": 120,
            },
            "ppo": {
                "steps": STEPS,
                "batch_size": GROUPS * SAMPLES,
                "samples_per_prompt": SAMPLES,
                "minibatches": 2,
                "checkpoint": {"every": checkpoint_every, "keep": 3},
                "algorithm": {
                    "advantage": "grpo",
                    "clip_high": 0.28,
                    "dynamic_sampling": {"max_attempts": ATTEMPTS},
                    "ptx": {"coefficient": 0.1, "share": 0.5},
                    "kl": {"placement": "none"},
                },
                "rollout": {"workers": workers, "kv_cache_gb": 0.05, "sampling": {"max_new_tokens": 16}},
                "policy": {"workers": workers, "optimizer": {"learning_rate": 1e-3}},
                "reward": {
                    "model": None,
                    "workers": workers | {"env": {"PYTHONPATH": str(inputs)}},
                    "functions": [{"name": "fifth", "function": "rewards_for_groups:fifth"}],
                },
            },
        }
    )


@pytest.fixture(scope="module")
def finished(ray_cluster, tiny_model, inputs, tmp_path_factory) -> RunFolder:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(inputs))
        yield run(config(tmp_path_factory.mktemp("runs"), inputs, tiny_model))


def ledger(folder: RunFolder) -> list[LedgerEntry]:
    return list(read_ledger(folder.path / "ledger.jsonl"))


def test_groups_without_signal_are_replaced_and_recorded_in_the_ledger(finished):
    trained = [rollout.rpartition("/")[0] for entry in ledger(finished) for rollout in entry.trained]
    dropped = [prompt for entry in ledger(finished) for prompt, _ in entry.dropped]
    assert dropped and {reason for entry in ledger(finished) for _, reason in entry.dropped} == {NO_SIGNAL}
    assert set(Counter(trained).values()) == {SAMPLES} and len(set(trained)) == STEPS * GROUPS
    assert len(set(dropped)) == len(dropped) and not set(dropped) & set(trained), "each group ends once"
    assert all(len(entry.dropped) <= (ATTEMPTS - 1) * GROUPS for entry in ledger(finished))


def test_metrics_cover_dropped_groups_and_demonstrations(finished):
    records = read_metrics(finished.metrics)
    assert [record["sampling/groups_dropped"] for record in records] == [len(e.dropped) for e in ledger(finished)]
    assert all(record["reward/std"] > 0 for record in records), "what is trained has a signal"
    losses = [record["policy/ptx_loss"] for record in records]
    assert losses[-1] < losses[0], "the policy also learns the demonstrations"
    assert "value/loss" not in records[0] and "kl/sequence" not in records[0]


def test_a_stopped_run_saves_a_checkpoint_and_resumes_bit_exactly(finished, inputs, tiny_model, tmp_path, monkeypatch):
    """The run drops the same groups, uses the same demonstrations and gets the same weights."""
    record = RunLogger.record

    def record_and_be_told(logger: RunLogger, state: TrainingState, *rest: object) -> dict[str, float]:
        metrics = record(logger, state, *rest)
        if state.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return metrics

    monkeypatch.setattr(RunLogger, "record", record_and_be_told)
    settings, folder = config(tmp_path, inputs, tiny_model, checkpoint_every=100), RunFolder(tmp_path / finished.name)
    with pytest.raises(RunStopped, match=f"after step 1 of {STEPS}"):
        run(settings)
    assert load_state(folder.checkpoints / "step_1").step == 1 and not folder.policy.exists()
    assert read_events(folder.events)[-1].message.startswith("the run was asked to stop, and stopped after step 1")
    assert folder.report.is_file()

    run(settings, resume=True)
    assert ledger(folder) == ledger(finished)
    ours, theirs = (load_file(run_folder.policy / "model.safetensors") for run_folder in (folder, finished))
    assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)
