"""A run folder lets one process in, refuses to start over an old run, and its files are replaced whole or not at
all."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys

import pytest

from rlhf_ray.runs.run_folder import RunFolder, RunFolderBusy, RunFolderTaken, atomic_write

HOLD = """
import sys
from rlhf_ray.runs.run_folder import RunFolder
with RunFolder(sys.argv[1]).claim():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder `run`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_second_process_is_refused_and_the_holder_named(tmp_path, holder):
    with pytest.raises(RunFolderBusy, match=f"pid {holder.pid} "), RunFolder(tmp_path / "run").claim(resume=True):
        pass


def test_claim_dies_with_its_process_however_it_ends(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait(timeout=10)
    with RunFolder(tmp_path / "run").claim() as folder:
        assert f"pid {os.getpid()} " in (folder.path / "run.lock").read_text()


def test_claims_within_one_process_exclude_each_other_and_end_with_their_block(tmp_path):
    folder = RunFolder(tmp_path / "with space" / "run")
    with folder.claim():
        with pytest.raises(RunFolderBusy), folder.claim():
            pass
    with folder.claim():
        assert folder.path.is_dir()


@pytest.mark.parametrize("left_behind", ["config", "metrics", "checkpoints", "policy"])
def test_fresh_run_never_starts_over_an_old_one(tmp_path, left_behind):
    folder = RunFolder(tmp_path / "run")
    with folder.claim():
        assert not folder.holds_run
        getattr(folder, left_behind).mkdir()
    with pytest.raises(RunFolderTaken, match="--resume"), folder.claim():
        pass
    with folder.claim(resume=True) as same:
        assert same.holds_run


def test_refused_fresh_run_lets_the_folder_go(tmp_path):
    folder = RunFolder(tmp_path)
    folder.config.write_text("a: 1")
    with pytest.raises(RunFolderTaken), folder.claim():
        pass
    with folder.claim(resume=True):
        pass


def test_resume_of_nothing_begins(tmp_path):
    with RunFolder(tmp_path / "new").claim(resume=True) as folder:
        assert folder.path.is_dir() and not folder.holds_run


def test_paths_are_inside_and_survive_a_change_of_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = RunFolder("runs/a")
    monkeypatch.chdir("/")
    assert pickle.loads(pickle.dumps(folder)) == folder
    assert folder.name == "a"
    assert folder.stage_metrics("ppo") == tmp_path / "runs/a/metrics.jsonl"
    assert folder.stage_metrics("sft") == tmp_path / "runs/a/sft/metrics.jsonl"


def test_atomic_write_replaces_whole_files_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "evaluation.json"
    atomic_write(path, "old")
    atomic_write(path, "nøw")
    assert path.read_bytes() == "nøw".encode()
    assert [entry.name for entry in tmp_path.iterdir()] == ["evaluation.json"]


def test_failed_atomic_write_keeps_the_old_content(tmp_path):
    path = tmp_path / "file"
    atomic_write(path, b"old")
    with pytest.raises(UnicodeEncodeError):
        atomic_write(path, "half a pair: \ud83d")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
