"""What a run uploads to real object-store servers, and what another machine downloads from them."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from rlhf_ray.runs import atomic_checkpoint
from rlhf_ray.runs.atomic_checkpoint import NotACheckpoint
from rlhf_ray.runs.run_folder import RunFolderBusy
from rlhf_ray.runs.storage.folders import (
    IncompleteFolder,
    fetch_folder,
    folder_names,
    mark_incomplete,
    read_manifest,
    upload_files,
    upload_folder,
)
from rlhf_ray.runs.storage.lease import STALE_S, Lease
from rlhf_ray.runs.storage.mirror import Mirror
from rlhf_ray.runs.storage.session import download_run
from rlhf_ray.runs.storage.store import Store, StoreFailed

SERVERS = {"s3": "s3_server", "gs": "google_server"}


@pytest.fixture(params=SERVERS)
def store(request) -> Store:
    request.getfixturevalue(SERVERS[request.param])
    return Store(f"{request.param}://runs/{request.node.originalname}/small")


def model(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def checkpoint(run: Path, step: int) -> Path:
    temporary = atomic_checkpoint.begin(run / "checkpoints", step)
    (temporary / "state.json").write_text(json.dumps({"step": step}))
    return atomic_checkpoint.seal(temporary)


def mirror(run: Path, store: Store, **settings: float) -> Mirror:
    run.mkdir(exist_ok=True)
    lease = Lease.take(store, run)
    lease.mark_local_newest()
    return Mirror(run, store, lease, **settings)


@pytest.mark.parametrize("scheme", [*SERVERS, "file"])
def test_objects_of_a_store(scheme, request, tmp_path):
    if scheme in SERVERS:
        request.getfixturevalue(SERVERS[scheme])
    store = Store(f"{scheme}://runs/objects" if scheme in SERVERS else f"file://{tmp_path}/there")
    (tmp_path / "large").write_bytes(bytes(range(256)) * 90_000)  # several chunks
    store.put_file(tmp_path / "large", "a/large")
    store.put_text("b", "é")
    store.put_text("b", "è")
    store.get_file("a/large", tmp_path / "back" / "large")
    assert (tmp_path / "back" / "large").read_bytes() == (tmp_path / "large").read_bytes()
    assert store.text("b") == "è" and store.text("c") is None and store.modified_at("c") is None
    assert store.names() == ["a/large", "b"] and store.names("a") == ["a/large"]
    store.delete("a/large")
    store.delete("a/large")
    assert store.names() == ["b"]
    with pytest.raises(StoreFailed, match="a/large"):
        store.get_file("a/large", tmp_path / "gone")
    assert not (tmp_path / "gone").exists()


def test_a_partial_upload_is_no_model(store, tmp_path):
    model(tmp_path / "here" / "sft")
    mark_incomplete(store, "sft")
    upload_files(store, tmp_path / "here", "sft")
    with pytest.raises(IncompleteFolder, match="upload was not finished"):
        fetch_folder(store, tmp_path / "there", "sft")
    download_run(store, tmp_path / "there", print)
    assert not (tmp_path / "there" / "sft").exists()
    upload_folder(store, tmp_path / "here", "sft")
    fetched = fetch_folder(store, tmp_path / "there", "sft")
    assert (fetched / "model.safetensors").read_bytes() == b"weights"


def test_a_damaged_model_is_refused_and_a_changed_one_fetched_again(store, tmp_path):
    run, other = tmp_path / "here", tmp_path / "there"
    model(run / "sft")
    upload_folder(store, run, "sft")
    fetch_folder(store, other, "sft")
    model(run / "sft", b"newer")
    upload_folder(store, run, "sft")
    assert (fetch_folder(store, other, "sft") / "model.safetensors").read_bytes() == b"newer"
    store.put_text("sft/model.safetensors", "other")
    assert fetch_folder(store, other, "sft"), "this node has it whole"
    with pytest.raises(IncompleteFolder, match="SHA-256"):
        fetch_folder(store, tmp_path / "third", "sft")
    assert not (tmp_path / "third" / "sft" / "model.safetensors").exists()


def test_a_run_is_mirrored_and_comes_to_another_machine(store, tmp_path):
    run, other = tmp_path / "here", tmp_path / "there"
    going = mirror(run, store)
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    (run / "sft").mkdir()
    (run / "sft" / "metrics.jsonl").write_text('{"step": 1}\n')
    (run / "checkpoints" / "tmp_step_3").mkdir(parents=True)
    (run / "checkpoints" / "tmp_step_3" / "torn").touch()
    for step in (1, 2):
        checkpoint(run, step)
    going.push()
    assert folder_names(store) == ["checkpoints/step_1", "checkpoints/step_2"]

    model(run / "sft")  # next to its metrics
    checkpoint(run, 4)
    atomic_checkpoint.keep_newest(run / "checkpoints", 2, up_to=4)
    going.push()
    assert folder_names(store) == ["checkpoints/step_2", "checkpoints/step_4", "sft"]
    assert not [name for name in store.names() if "step_1" in name or "tmp_" in name]
    assert "sft/metrics.jsonl" in store.names()

    other.mkdir()
    download_run(store, other, print)
    assert (other / "metrics.jsonl").read_text() == (run / "metrics.jsonl").read_text()
    assert sorted(path.name for path in (other / "checkpoints").iterdir()) == ["step_4"]
    atomic_checkpoint.verify(other / "checkpoints" / "step_4", "state.json")
    assert sorted(path.name for path in (other / "sft").iterdir()) == [
        "config.json",
        "metrics.jsonl",
        "model.safetensors",
    ]

    going.lease.release()
    resumed = mirror(other, store)
    resumed.push()
    assert "checkpoints/step_2" in folder_names(store), "an older one stays until there is a newer one"
    checkpoint(other, 6)
    resumed.push()
    assert folder_names(store) == ["checkpoints/step_4", "checkpoints/step_6", "sft"]


def test_a_damaged_checkpoint_is_skipped_with_a_warning_but_never_all_of_them(store, tmp_path):
    going = mirror(tmp_path / "here", store)
    for step in (1, 2):
        checkpoint(tmp_path / "here", step)
    going.push()
    going.lease.release()
    store.put_text("checkpoints/step_2/state.json", "other")
    said: list[str] = []
    download_run(store, tmp_path / "there", said.append)
    assert [path.name for path in (tmp_path / "there" / "checkpoints").iterdir()] == ["step_1"]
    assert len(said) == 1 and "step_2/state.json" in said[0]
    store.put_text("checkpoints/step_1/state.json", "other")
    with pytest.raises(NotACheckpoint, match="none of the 2 checkpoints"):
        download_run(store, tmp_path / "third", said.append)


@pytest.mark.engine
@pytest.mark.parametrize("store", ["s3"], indirect=True)  # the other client tries for 20 s inside each call
def test_an_outage_is_reported_once_and_the_upload_completed(s3_server, store, tmp_path):
    run = tmp_path / "here"
    going = mirror(run, store, every_s=0.2, patience_s=1.0)
    said: list[str] = []
    with going.running(said.append):
        (run / "metrics.jsonl").write_text("1\n")
        wait_for(lambda: store.text("metrics.jsonl") == "1\n")
        s3_server.stop()
        (run / "metrics.jsonl").write_text("1\n2\n")
        wait_for(lambda: said)
        with pytest.raises(StoreFailed, match=r"gave up after 1 s.*--resume"):
            going.push()
        s3_server.start()
        wait_for(lambda: store.text("metrics.jsonl") == "1\n2\n" and len(said) == 2)
    assert "does not answer" in said[0] and "answers again" in said[1] and "canary" not in said[0]


def test_one_run_at_a_time_and_a_stale_lease_is_free(store, tmp_path, monkeypatch):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    first = Lease.take(store, tmp_path / "first")
    first.mark_local_newest()
    with pytest.raises(RunFolderBusy, match=r"in use by pid \d+ on .* last renewed its lease \d+ s ago"):
        Lease.take(store, tmp_path / "second")
    assert Lease.take(store, tmp_path / "first").local_is_newest, "the machine that had it, after a crash"

    monkeypatch.setattr("rlhf_ray.runs.storage.lease.STALE_S", 0.5)
    assert STALE_S == 60
    time.sleep(1.5)  # S3 says when in whole seconds
    second = Lease.take(store, tmp_path / "second")
    assert not second.local_is_newest
    with pytest.raises(RunFolderBusy, match="taken over"):
        first.check()
    second.mark_local_newest()
    second.release()
    assert not Lease.take(store, tmp_path / "first").local_is_newest


def wait_for(condition, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_an_unreadable_manifest_is_reported(store):
    store.put_text(".manifests/sft.json", "[1")
    with pytest.raises(IncompleteFolder, match="manifest"):
        read_manifest(store, "sft")
