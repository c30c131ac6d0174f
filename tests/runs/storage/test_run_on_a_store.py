"""A whole run on s3:// with the real engines: stopped, and resumed on another machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rlhf_ray.config import RunConfig, parse_config
from rlhf_ray.runs.events import read_events
from rlhf_ray.runs.ledger import read_ledger
from rlhf_ray.runs.metrics import read_metrics
from rlhf_ray.runs.run_folder import RunFolderTaken
from rlhf_ray.runs.storage.folders import folder_names
from rlhf_ray.runs.storage.location import working_root
from rlhf_ray.runs.storage.session import read_run, run_folder
from rlhf_ray.runs.storage.store import Store, StoreFailed
from rlhf_ray.runtime.stopping import RunStopped
from rlhf_ray.stages.run import run

WORKERS = {"workers": {"threads": 1, "cpus": 0.1}}
STEPS = 4


def config(folder: object, model: object, data: Path, stages: Sequence[str] = ("ppo",), **ppo: object) -> RunConfig:
    """GRPO on a reward function, from a model that is there or its fine-tuning."""
    return parse_config(
        {
            "name": "small",
            "folder": str(folder),
            "stages": list(stages),
            "model": {"path": str(model)},
            "data": {
                "prompts": {"location": str(data / "prompts.jsonl")},
                "demonstrations": {"location": str(data / "demonstrations.jsonl")},
                "max_prompt_tokens": 40,
                "max_dialogue_tokens": 64,
            },
            "sft": {"batch_size": 16, "learner": WORKERS},
            "ppo": {
                "steps": STEPS,
                "batch_size": 8,
                "samples_per_prompt": 4,
                "algorithm": {"advantage": "grpo", "kl": {"placement": "none"}},
                "rollout": WORKERS | {"sampling": {"max_new_tokens": 8}, "kv_cache_gb": 0.05},
                "policy": WORKERS | {"optimizer": {"learning_rate": 1e-3}},
                "reward": WORKERS
                | {"model": None, "functions": [{"name": "utility", "function": f"{__name__}:short"}]},
                "checkpoint": {"every": 2, "keep": 2},
            }
            | ppo,
        }
    )


def short(prompts, responses, metadata):
    return [-float(len(response)) for response in responses]


@pytest.fixture
def data(tmp_path):
    questions = [f"Hello, where is my order {number}?" for number in range(24)]
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": "On Monday."}] for q in questions]
    for name, lines in (
        ("prompts", [{"prompt": question} for question in questions]),
        ("demonstrations", [{"messages": dialogue} for dialogue in turns]),
    ):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


@pytest.fixture
def cloud(s3_server, working_root, tmp_path, request):
    """A folder on the server, and the environment of workers on another node than the driver's: with other working folders."""
    shared = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    folder = f"s3://runs/{request.node.name}"
    return folder, {"env": shared | {"RLHF_RAY_WORKING_FOLDER": str(tmp_path / "node")}}


def stop_after_a_step(folder) -> threading.Thread:
    """The signal that a cluster sends."""

    def watch() -> None:
        while not read_metrics(folder.metrics):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_a_stopped_run_resumes_elsewhere_to_the_same_weights(cloud, ray_cluster, tiny_model, data, tmp_path):
    """Learner ranks, rollout and reward workers see other working folders than the driver, before and after."""
    folder, environment = cloud
    workers = {"workers": WORKERS["workers"] | environment}
    two = {
        "workers": workers["workers"] | {"count": 2},
        "optimizer": {"learning_rate": 1e-3},
        "sharding": {"zero_stage": 2},
    }
    rollout = workers | {"sampling": {"max_new_tokens": 8}, "kv_cache_gb": 0.05}
    reward = workers | {"model": None, "functions": [{"name": "short", "function": f"{__name__}:short"}]}
    stored = config(folder, tiny_model, data, ["sft", "ppo"], policy=two, rollout=rollout, reward=reward)
    watching = stop_after_a_step(run_folder(stored))
    with pytest.raises(RunStopped, match="after step"):
        run(stored)
    watching.join()
    store = Store(f"{folder}/small")
    checkpoint, sft = folder_names(store)
    assert sft == "sft" and list((tmp_path / "node").glob("*/small/sft/model.safetensors")), "workers fetched it"
    elsewhere = json.loads(store.text(f"{checkpoint}/.elsewhere.json"))
    assert (
        sum("zero_pp_rank_" in name for name in elsewhere) == 2
        and "policy_learner/state/mp_rank_00_model_states.pt" in elsewhere
    )
    with pytest.raises(RunFolderTaken, match="--resume"):
        run(stored)

    for machine in (working_root(), tmp_path / "node"):
        shutil.rmtree(machine)
    resumed = run(stored, resume=True)
    events = [event.message for event in read_events(resumed.events)]
    assert any("goes on after step" in message for message in events)
    assert [entry.step for entry in read_ledger(resumed.path / "ledger.jsonl")] == list(range(1, STEPS + 1))

    copy = read_run(f"{folder}/small", "sft", "policy")
    plain = run(config(tmp_path / "plain", copy.sft, data, policy=two, rollout=rollout))
    assert copy.path != resumed.path
    ours, theirs = (load_file(path / "model.safetensors") for path in (copy.policy, plain.policy))
    assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)
    assert list(read_ledger(copy.path / "ledger.jsonl")) == list(read_ledger(plain.path / "ledger.jsonl"))
    assert copy.report.is_file() and "canary" not in copy.config.read_text()
    assert not [name for name in store.names() if "tmp_" in name]


def test_a_bucket_that_is_not_there_is_refused_before_anything_starts(cloud, tiny_model, data):
    with pytest.raises(StoreFailed, match=r"s3://nowhere/runs/small.*does not exist"):
        run(config("s3://nowhere/runs", tiny_model, data))
