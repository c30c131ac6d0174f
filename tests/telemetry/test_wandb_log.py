"""Weights & Biases, by the real package in offline mode: what was sent is read back from the file that would be synchronised."""

from __future__ import annotations

import json
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_ray.config import ConfigError, parse_config
from rlhf_ray.config.telemetry import WandbConfig
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.telemetry import wandb_log
from rlhf_ray.telemetry.wandb_log import KEY, WandbLog, WandbUnavailable, check_wandb

OFFLINE = WandbConfig(project="suite", mode="offline")
RECORDS = [{"step": step, "timestamp": 1.5e9, "reward/mean": 0.5 * step, "kl/sequence": None} for step in range(1, 6)]


BLOCK, HEADER = 1 << 15, struct.Struct("<IHB")
"""W&B's files are logs in LevelDB's format, after 7 bytes that name it: blocks of chunks with checksum, length and type."""


def messages(path: Path) -> Iterator[bytes]:
    """What was appended to a log: in one chunk (type 1), or in several (2, 3 …, 4)."""
    data, at, parts = path.read_bytes(), HEADER.size, b""
    while at + HEADER.size <= len(data):
        if (left := BLOCK - at % BLOCK) < HEADER.size:
            at += left
            continue
        _, length, kind = HEADER.unpack_from(data, at)
        parts += data[at + HEADER.size : at + HEADER.size + length]
        at += HEADER.size + length
        if kind in (1, 4):
            yield parts
            parts = b""


def sent(folder: RunFolder, attempts: int) -> tuple[set[str], list[dict[str, float]]]:
    """Ids of the runs, and their rows in the order in which they were sent. W&B's own process ends its files a little later."""
    from wandb.proto.wandb_internal_pb2 import Record

    deadline = time.monotonic() + 20
    while True:
        paths = sorted((folder.path / "wandb").glob("offline-run-*/*.wandb"))
        records = [record for path in paths for record in map(Record.FromString, messages(path))]
        if sum(record.HasField("exit") for record in records) == attempts or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    rows = [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    return {record.run.run_id for record in records if record.HasField("run")}, rows


def test_figures_arrive_by_their_names_once_and_in_one_run(tmp_path):
    pytest.importorskip("wandb")
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.config.write_text("name: run\nppo: {steps: 5}\n")
    with WandbLog(OFFLINE, folder, "ppo") as log:
        log.follow(RECORDS[:2])
        log.follow(RECORDS[:3])
    with WandbLog(OFFLINE, folder, "ppo") as log:
        log.follow(RECORDS[3:])
    ids, rows = sent(folder, attempts=2)
    assert len(ids) == 1, "the run of a stage is the same after a resume"
    assert [(row["_step"], row["reward/mean"]) for row in rows] == [(step, 0.5 * step) for step in range(1, 6)]
    assert not {"timestamp", "step", "kl/sequence"} & {name for row in rows for name in row}


def test_nothing_happens_where_it_is_not_set(tmp_path):
    with WandbLog(None, RunFolder(tmp_path / "run"), "ppo") as log:
        log.follow(RECORDS)
    check_wandb(None)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """Something that can be found under the name."""
    (tmp_path / "site" / "wandb").mkdir(parents=True)
    (tmp_path / "site" / "wandb" / "__init__.py").touch()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    return tmp_path / "site" / "wandb"


def test_a_missing_package_is_reported_before_anything_starts(package):
    check_wandb(OFFLINE)
    (package / "__init__.py").unlink()
    wandb_log.importlib.invalidate_caches()
    with pytest.raises(WandbUnavailable, match="pip install 'rlhf-ray\\[wandb\\]'"):
        check_wandb(OFFLINE)


def test_the_key_comes_from_the_environment(package, monkeypatch):
    online = WandbConfig(project="suite")
    monkeypatch.delenv(KEY, raising=False)
    with pytest.raises(WandbUnavailable, match=KEY):
        check_wandb(online)
    monkeypatch.setenv(KEY, "a-key")
    check_wandb(online)


@pytest.mark.parametrize(
    "section", [{"project": ""}, {}, {"project": "a", "api_key": "b"}, {"project": "a", "mode": "on"}]
)
def test_invalid_configuration_is_refused(section):
    with pytest.raises(ConfigError, match="telemetry.wandb"):
        parse_config({"name": "a", "model": {"path": "a"}, "data": {"prompts": "a"}, "telemetry": {"wandb": section}})
