"""A reward learned from demonstrations, on the real engines: the discriminator learns and rewards; resuming is bit-exact."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from rlhf_ray.config import RunConfig, parse_config
from rlhf_ray.models.loading import NotAModel
from rlhf_ray.runs.ledger import read_ledger
from rlhf_ray.runs.metrics import read_metrics
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.stages.run import run

STEPS, BATCH = 4, 8


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with prompts and demonstrations. One answer in three is longer than any rollout."""
    folder = tmp_path_factory.mktemp("inputs")
    asked = [{"role": "user", "content": f"Hello, where is my order {number}?"} for number in range(30)]
    answers = ["I am sorry.", "Your order will arrive on Monday.", "I am sorry. " * 9]
    rows = [
        {"messages": [question, {"role": "assistant", "content": answers[number % 3]}]}
        for number, question in enumerate(asked)
    ]
    for name, lines in (("prompts", [{"prompt": [question]} for question in asked]), ("demonstrations", rows)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def config(folder: Path, inputs: Path, policy: Path, **discriminator: object) -> RunConfig:
    """No reference and no other reward; the discriminator has two ranks."""
    workers = {"cpus": 0.1}
    optimizer = {"learning_rate": 1e-3, "schedule": "constant"}
    return parse_config(
        {
            "name": "adversarial",
            "folder": str(folder),
            "stages": ["ppo"],
            "model": {"path": str(policy)},
            "data": {
                "prompts": {"location": str(inputs / "prompts.jsonl")},
                "demonstrations": {"location": str(inputs / "demonstrations.jsonl")},
                "max_prompt_tokens": 80,
                "max_dialogue_tokens": 128,
            },
            "ppo": {
                "steps": STEPS,
                "batch_size": BATCH,
                "minibatches": 2,
                "checkpoint": {"every": 1, "keep": 4},
                "algorithm": {"kl": {"placement": "none"}},
                "rollout": {"workers": workers, "kv_cache_gb": 0.05, "sampling": {"max_new_tokens": 16}},
                "policy": {"workers": workers, "optimizer": optimizer},
                "value": {"workers": workers, "optimizer": optimizer},
                "reward": {"model": None},
                "discriminator": {
                    "workers": workers | {"count": 2},
                    "sharding": {"zero_stage": 2},
                    "optimizer": optimizer,
                    "minibatches": 2,
                    "replay": {"batches": 2},
                    "trusted_accuracy": 0.9,
                    "sufficient_accuracy": 0.95,
                }
                | discriminator,
            },
        }
    )


@pytest.fixture(scope="module")
def finished(ray_cluster, tiny_model, inputs, tmp_path_factory) -> RunFolder:
    return run(config(tmp_path_factory.mktemp("runs"), inputs, tiny_model))


def test_the_discriminator_learns_and_rewards(finished):
    """The outputs of random weights do not resemble answers, so a few updates are enough to recognise them."""
    records = read_metrics(finished.metrics)
    assert records[0]["discriminator/loss"] == pytest.approx(0.693, abs=0.01)
    assert records[-1]["discriminator/loss"] < 0.65 and records[-1]["discriminator/score_gap"] > 0.2
    for record in records:
        sides = (record["discriminator/accuracy_demonstrations"], record["discriminator/accuracy"])
        assert all(0 <= side <= 1 for side in sides)
        trusted = record["discriminator/trusted"] == 1
        assert trusted == (record["discriminator/accuracy"] >= 0.9)
        assert record["reward/mean"] == pytest.approx(record["reward/part/discriminator"] if trusted else 0.0, abs=1e-6)
        assert ("policy/loss" in record) == ("value/loss" in record) == trusted, "without a reward the policy waits"
        assert record["time/discriminator_s"] > 0
    assert records[-1]["discriminator/trusted"] == 1 and records[-1]["reward/mean"] < -0.05


def test_dropped_demonstrations_are_recorded(finished):
    assert "demonstrations exceed data.max_prompt_tokens 80 or ppo.rollout.sampling" in finished.events.read_text()


def test_a_checkpoint_holds_the_newest_samples(finished):
    columns = load_file(finished.checkpoints / f"step_{STEPS}" / "discriminator_replay.safetensors")
    assert len(columns["lengths"]) == 2 * BATCH and columns["lengths"].sum() == len(columns["token_ids"])
    assert (finished.checkpoints / f"step_{STEPS}" / "discriminator_learner").is_dir()


def test_resume_is_bit_exact(finished, inputs, tiny_model, tmp_path):
    """The same demonstrations, old samples and discriminator outputs, and the same policy."""
    copy = RunFolder(shutil.copytree(finished.path, tmp_path / finished.name))
    shutil.rmtree(copy.policy)
    for step in range(3, STEPS + 1):
        shutil.rmtree(copy.checkpoints / f"step_{step}")
    run(config(tmp_path, inputs, tiny_model), resume=True)
    assert list(read_ledger(copy.path / "ledger.jsonl")) == list(read_ledger(finished.path / "ledger.jsonl"))
    ours, theirs = (read_metrics(folder.metrics) for folder in (copy, finished))
    same = [key for key in theirs[-1] if not key.startswith(("time", "throughput", "idle"))]
    assert [{key: record.get(key) for key in same} for record in ours] == [
        {key: record.get(key) for key in same} for record in theirs
    ]
    for name in ("policy/model.safetensors", f"checkpoints/step_{STEPS}/discriminator_replay.safetensors"):
        one, other = (load_file(folder.path / name) for folder in (copy, finished))
        assert one.keys() == other.keys() and all((one[key] == other[key]).all() for key in one), name


def test_another_tokenizer_is_refused(inputs, tiny_model, tmp_path, ray_cluster):
    from rlhf_ray.models.tiny import build_tiny_model

    other = tmp_path / "other"
    build_tiny_model(
        other, ["Something else entirely."] * 20, vocab_size=300, hidden_size=64, layers=1, heads=2, kv_heads=1
    )
    with pytest.raises(NotAModel, match=r"ppo\.discriminator\.model: the tokenizer"):
        run(config(tmp_path / "runs", inputs, tiny_model, model=str(other)))
