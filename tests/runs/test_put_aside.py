"""A new run keeps the earlier one under another name."""

from __future__ import annotations

import pytest

from rlhf_ray.runs.run_folder import RunFolder, RunFolderBusy, put_aside


def test_numbers_go_up_and_nothing_is_lost(tmp_path):
    for content in ("first", "second"):
        folder = RunFolder(tmp_path / "run")
        with folder.claim():
            folder.config.write_text(content)
        put_aside(folder)
    assert (tmp_path / "run.1" / "config.yaml").read_text() == "first"
    assert (tmp_path / "run.2" / "config.yaml").read_text() == "second"
    assert not folder.path.exists() and put_aside(folder) is None


def test_a_running_run_stays(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.claim(), pytest.raises(RunFolderBusy):
        put_aside(folder)
    assert folder.path.is_dir()
