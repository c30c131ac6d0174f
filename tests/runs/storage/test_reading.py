"""Commands that read a run on a store, and checkpoint files that other nodes write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlhf_ray.cli import app
from rlhf_ray.runs import atomic_checkpoint
from rlhf_ray.runs.run_folder import RunFolderError
from rlhf_ray.runs.storage.folders import IncompleteFolder, fetch_copy, upload_folder
from rlhf_ray.runs.storage.location import copy_of, portable, working_folder
from rlhf_ray.runs.storage.rank_files import REMOTE_FILES, fetch_rank_files, record_remote_files, upload_rank_files
from rlhf_ray.runs.storage.session import read_run
from rlhf_ray.runs.storage.store import Store
from rlhf_ray.serving.deploying import find_version
from rlhf_ray.serving.versions import Version

pytestmark = pytest.mark.usefixtures("s3_server", "working_root")


@pytest.fixture
def uri(request, tmp_path) -> str:
    """A run of three steps with a policy."""
    uri = f"s3://runs/{tmp_path.name}/small"
    store = Store(uri)
    store.put_text("config.yaml", "name: small\nstages: [ppo]\nppo: {steps: 4}\n")
    store.put_text("metrics.jsonl", "".join(json.dumps({"step": n, "timestamp": n}) + "\n" for n in (1, 2, 3)))
    policy = tmp_path / "run" / "policy"
    policy.mkdir(parents=True)
    (policy / "config.json").write_text("{}")
    (policy / "model.safetensors").write_bytes(b"weights")
    upload_folder(store, tmp_path / "run", "policy")
    return uri


def test_a_run_is_read_without_its_weights_and_served_with_them(uri):
    run = read_run(uri)
    assert (run.policy / "config.json").is_file() and not (run.policy / "model.safetensors").exists()
    version = find_version(uri)
    assert version == Version("small-3", f"{uri}#policy") == find_version(f"{uri}#policy", "small-3")
    assert not (run.policy / "model.safetensors").exists(), "each node that serves it fetches them"
    assert fetch_copy(version.folder) == str(run.policy) == str(copy_of(version.folder))
    assert (run.policy / "model.safetensors").read_bytes() == b"weights"
    with pytest.raises(IncompleteFolder, match="sft does not exist"):
        find_version(f"{uri}#sft")
    assert not working_folder(uri).exists(), "a run that works here is left alone"
    with pytest.raises(RunFolderError, match="holds no run"):
        read_run(uri + "er")


def test_status_and_report_by_uri(uri):
    said = CliRunner().invoke(app, ["status", uri])
    assert said.exit_code == 0 and "3/4" in said.output, said.output
    said = CliRunner().invoke(app, ["report", uri])
    assert said.exit_code == 0 and Path(said.output.strip().replace("\n", "")).is_file(), said.output


def test_files_of_two_nodes_make_one_checkpoint(tmp_path, monkeypatch, request):
    """Driver and two ranks, each on a node of its own; then two other nodes that read it."""
    uri = f"s3://runs/{request.node.name}/small"
    store, run = Store(uri), working_folder(uri)
    temporary = atomic_checkpoint.begin(run / "checkpoints", 2)
    reference, files = portable(temporary / "policy_learner"), {}
    for rank in (0, 1):
        monkeypatch.setenv("RLHF_RAY_WORKING_FOLDER", str(tmp_path / f"node{rank}"))
        part = working_folder(uri) / "checkpoints" / "tmp_step_2" / "policy_learner" / "state"
        part.mkdir(parents=True)
        (part / f"zero_pp_rank_{rank}_optim.pt").write_text(str(rank))
        if rank == 0:
            (part / "model_states.pt").write_text("model")
        files |= upload_rank_files(reference)
        assert not part.exists()
    monkeypatch.setenv("RLHF_RAY_WORKING_FOLDER", str(tmp_path / "work"))
    record_remote_files(temporary / "policy_learner", files)
    (temporary / "state.json").write_text("{}")
    atomic_checkpoint.seal(temporary)
    kept = portable(run / "checkpoints" / "step_2" / "policy_learner")
    with pytest.raises(IncompleteFolder):
        fetch_rank_files(kept, 0)
    others = json.loads((run / "checkpoints" / "step_2" / REMOTE_FILES).read_text())
    upload_folder(store, run, "checkpoints/step_2", others)

    for rank in (0, 1):
        monkeypatch.setenv("RLHF_RAY_WORKING_FOLDER", str(tmp_path / f"other{rank}"))
        part = fetch_rank_files(kept, rank)
        read = sorted(path.name for path in part.rglob("*.pt"))
        assert read == ["model_states.pt", f"zero_pp_rank_{rank}_optim.pt"]
    store.put_text("checkpoints/step_2/policy_learner/state/model_states.pt", "other")
    monkeypatch.setenv("RLHF_RAY_WORKING_FOLDER", str(tmp_path / "third"))
    with pytest.raises(IncompleteFolder, match="SHA-256"):
        fetch_rank_files(kept, 0)


def test_what_is_gone_from_the_store_is_not_read(uri):
    store = Store(uri)
    store.put_text("evaluation.json", "{}")
    run = read_run(uri, "policy")
    assert run.evaluation.is_file() and (run.policy / "model.safetensors").is_file()
    for name in store.names():
        store.delete(name)
    store.put_text("config.yaml", "name: small\nstages: [ppo]\nppo: {steps: 4}\n")  # begun again under the same name
    run = read_run(uri, "policy")
    assert not run.evaluation.exists() and not (run.policy / "config.json").exists()


@pytest.mark.parametrize("name", ["../../../outside", "/tmp/outside"])
def test_names_do_not_lead_out_of_the_copy(uri, name):
    Store(uri).put_text(".manifests/policy.json", json.dumps({name: "0" * 64}))
    with pytest.raises(IncompleteFolder, match="outside of its folder"):
        read_run(uri)
