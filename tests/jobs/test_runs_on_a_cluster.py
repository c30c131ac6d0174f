"""Runs on a real cluster of two nodes, through the commands: submit, follow, stop with a checkpoint, resume, serve."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import yaml

from rlhf_ray.driver.checkpointer import load_state
from rlhf_ray.runs.ledger import read_ledger
from rlhf_ray.runs.metrics import read_metrics
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.runs.status import read_status

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]
CANARY, FORWARDED = "canary-5d1f0c", "canary-8a7be2"
CONFIG = """
stages: [ppo]
model: {{path: {model}}}
data: {{prompts: {{location: data/prompts.jsonl}}, max_prompt_tokens: 40, max_dialogue_tokens: 64}}
ppo:
  steps: 2000
  batch_size: 8
  samples_per_prompt: 4
  algorithm: {{advantage: grpo, kl: {{placement: none}}}}
  rollout:
    workers: {{count: {rollout}, cpus: {cpus}, env: {{CANARY: {canary}}}}}
    sampling: {{max_new_tokens: 8}}
    kv_cache_gb: 0.05
  policy: {{workers: {{cpus: 0.5}}}}
  reward: {{model: null, workers: {{cpus: 0.1}}, functions: [{{name: short, function: "rewards:short"}}]}}
  placement: {{strategy: SPREAD}}
  checkpoint: {{every: 1000}}
"""
REWARDS = """
import os
import time

print("forwarded:", os.environ.get("JUDGE_KEY", "")[-2:])  # the driver imports this module, and reward workers do

def short(prompts, responses, metadata):
    time.sleep(0.3)  # the run must last until it is stopped
    return [-float(len(response)) for response in responses]
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A head and a second node, each a `ray start`."""
    spec = importlib.util.spec_from_file_location("local_cluster", ROOT / "cluster" / "local.py")
    local = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(local)
    with local.LocalCluster(nodes=2, cpus=3, token_file=tmp_path_factory.mktemp("token") / "token") as started:
        yield started


@pytest.fixture(scope="module")
def project(tiny_model, tmp_path_factory) -> Path:
    """A directory to submit from: a reward function, prompts that git ignores, and files that must not be sent."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "data").mkdir()
    prompts = [{"prompt": f"Hello, where is my order {number}?"} for number in range(40)]
    (folder / "data" / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    (folder / ".env").write_text("PASSWORD=1\n")
    # Two workers of 2 CPUs are on two nodes of 3.
    for name, rollout, cpus in (("long", 2, 2.0), ("short", 1, 0.5)):
        text = CONFIG.format(model=tiny_model, rollout=rollout, cpus=cpus, canary=CANARY)
        (folder / f"{name}.yaml").write_text(f"name: {name}\nfolder: {folder / 'runs'}\n{text}")
    return folder


@pytest.fixture
def command(cluster, project) -> Callable[..., subprocess.CompletedProcess]:
    """`rlhf-ray …` in the project, with the cluster's token unless told otherwise."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "rlhf_ray", *arguments],
            cwd=project, env=cluster.environment | {"RAY_ADDRESS": cluster.address, "COLUMNS": "200"} | environment,
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    return run


def wait_for(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(0.5)


def holds(path: Path, text: str) -> bool:
    return path.is_file() and not path.is_symlink() and text.encode() in path.read_bytes()


@pytest.mark.parametrize(
    ("environment", "says"),
    [({}, "requires a token, and none was sent"), ({"RAY_AUTH_TOKEN": "0" * 64}, "refuses this token")],
)
def test_a_missing_or_wrong_token_is_refused(cluster, tmp_path, environment, says):
    without = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"HOME": str(tmp_path)}
    command = [sys.executable, "-m", "rlhf_ray", "list", "--address", cluster.address]
    result = subprocess.run(command, cwd=ROOT, env=without | environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert says in result.stderr and "RAY_AUTH_TOKEN" in result.stderr and "Traceback" not in result.stderr


ATTACH = """
import functools, sys
import ray
from ray._private import services
from rlhf_ray.runtime.cluster import attach

# This machine may have other clusters, too.
services._cached_find_gcs_addresses = functools.cache(lambda: frozenset(sys.argv[1:]))
attach("auto", log_to_driver=False)
print("attached", ray.get_runtime_context().gcs_address, sum(node["Alive"] for node in ray.nodes()), "nodes")
"""


def test_auto_is_this_machines_cluster_even_if_the_environment_names_the_job_api(cluster):
    environment = cluster.environment | {"RAY_ADDRESS": cluster.address}
    command = [sys.executable, "-c", ATTACH, cluster.gcs_address]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    # By another name of this machine.
    port = cluster.gcs_address.rpartition(":")[2]
    assert f":{port} 2 nodes" in result.stdout, result.stdout + result.stderr
    by_head = environment | {"RAY_ADDRESS": cluster.gcs_address}
    command_list = [sys.executable, "-m", "rlhf_ray", "list"]
    listed = subprocess.run(command_list, cwd=ROOT, env=by_head, capture_output=True, text=True, timeout=120)
    assert listed.returncode == 0, "the head knows where its dashboard is: " + listed.stderr
    wrong = environment | {"RAY_AUTH_TOKEN": "0" * 64}
    refused = subprocess.run(command, cwd=ROOT, env=wrong, capture_output=True, text=True, timeout=120)
    assert "NotAttached" in refused.stderr and "RAY_AUTH_TOKEN" in refused.stderr, refused.stderr


@pytest.mark.timeout(600)  # two cores that have other things to do, too
def test_a_run_is_submitted_watched_stopped_and_resumed_while_another_runs(cluster, command, project):
    long, short = RunFolder(project / "runs" / "long"), RunFolder(project / "runs" / "short")
    submitted = command("submit", "long.yaml", "--env", "JUDGE_KEY", JUDGE_KEY=FORWARDED)
    assert submitted.returncode == 0 and "long-attempt1" in submitted.stdout, submitted.stderr
    assert "left out  long.yaml" in submitted.stdout, "it has a value of an environment in it"
    assert command("submit", "short.yaml", "ppo.steps=2").returncode == 0
    wait_for(lambda: len(read_metrics(long.metrics)) >= 2, 240, "two steps of the first run")
    time.sleep(3)  # lines are printed every other second
    table = command("status").stdout
    row = next(line for line in table.splitlines() if line.startswith("long"))
    assert "running" in row and "/2000" in row and "2 rollout" in row and "on 2 nodes" in row, table

    twice = command("submit", "long.yaml")
    assert twice.returncode == 2 and "is running as long-attempt1" in twice.stderr

    followed = command("logs", "short", "--follow")
    assert followed.returncode == 0, followed.stdout + followed.stderr
    assert "2/2" in followed.stdout and "::rlhf-ray-status" not in followed.stdout
    assert read_status(short).step == 2 and short.policy.is_dir()

    stopped = command("stop", "long")
    assert stopped.returncode == 0 and "asked to stop, and stopped after step" in stopped.stdout, (
        stopped.stdout + stopped.stderr
    )
    steps = len(read_metrics(long.metrics))
    assert load_state(long.checkpoints / f"step_{steps}").step == steps < 1000, "no checkpoint was due yet"
    assert not long.policy.exists()

    resumed = command("resume", "long", f"ppo.steps={steps + 2}", "--follow")
    assert resumed.returncode == 0 and "long-attempt2" in resumed.stdout, resumed.stdout + resumed.stderr
    assert long.policy.is_dir()
    assert [record["step"] for record in read_metrics(long.metrics)] == list(range(1, steps + 3))
    trained = [id for entry in read_ledger(long.path / "ledger.jsonl") for id in entry.trained]
    assert len(trained) == len(set(trained)) == 8 * (steps + 2)

    runs = command("list").stdout.splitlines()
    assert sum("succeeded" in line for line in runs) == 2
    log = command("logs", "long").stdout.splitlines()
    assert "forwarded: e2" in log, "the driver has it, also when it is resumed"
    assert all(line.endswith("forwarded: ") for line in log if "forwarded:" in line and line != "forwarded: e2")
    written = [path for folder in (cluster.folder, long.path) for path in folder.rglob("*")]
    assert not [path for path in written if holds(path, FORWARDED)]
    # Ray itself writes down the environment of actors.
    assert not [p for p in written if holds(p, CANARY) and not p.name.startswith("runtime_env_agent")]


@pytest.mark.timeout(600)
def test_the_trained_policies_are_served_from_a_config_file(cluster, command, project):
    """Builds on the runs above: their policies by Ray Serve's own command, and a version that changes by changing the file."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = [f"port={port}", "keys_env=null", "policy.kv_cache_gb=0.1", "policy.workers.cpus=0.5"]
    config = yaml.safe_load(command("serve", "runs/short", "--dry-run", *settings).stdout)
    gateway, engines = config["applications"]
    old, new = engines["args"]["version"], {"name": "another", "folder": str(project / "runs" / "long" / "policy")}
    others = engines | {"name": "policy.another", "args": engines["args"] | {"version": new}}
    config["applications"].append(others)
    gateway["args"] |= {"candidate": new, "share": 0.5}
    deploy(cluster, project, config)
    versions: list[str] = []
    wait_for(lambda: versions.extend(answering(port, "user")) or bool(versions), 180, "an answer")
    shared = {version for number in range(20) for version in answering(port, f"user {number}")}
    assert shared == {"short-2", "another"}

    del gateway["args"]["candidate"], gateway["args"]["share"]
    gateway["args"] |= {"stable": new, "previous": old}
    deploy(cluster, project, config)
    wait_for(lambda: answering(port, "user 1") == answering(port, "user 2") == [new["name"]], 60, "the other version")
    assert {version for number in range(20) for version in answering(port, f"user {number}")} == {new["name"]}


def deploy(cluster, folder: Path, config: dict) -> None:
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "ray.serve.scripts", "deploy", str(file), "--address", cluster.address]
    done = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def answering(port: int, user: str) -> list[str]:
    """The version that answers a user; empty while no version answers."""
    body = {"model": "policy", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "user": user}
    try:
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=60)
    except httpx.TransportError:
        return []
    return [answer.headers["x-policy-version"]] if answer.status_code == 200 else []
