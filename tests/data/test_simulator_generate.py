"""The simulator's files: the same bytes for the same seed, complete or absent, and without leaks."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_ray.data.readers import Source, load
from rlhf_ray.data.records import dialogue_key
from rlhf_ray.data.simulator import PANEL, Sizes, pair_accuracy_ceiling, simulate, utility
from rlhf_ray.data.simulator import generate as generate_module

SMALL = Sizes(120, 120, 60, 30, 30, 30, 120, 60)
SCRIPT = """
import sys
from pathlib import Path
from rlhf_ray.data.simulator import Sizes, simulate
simulate(Path(sys.argv[1]), int(sys.argv[2]), Sizes(20, 20, 10, 10, 10, 10, 20, 10))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return simulate(tmp_path_factory.mktemp("simulator") / "a folder", 3, SMALL)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_same_seed_same_bytes_in_processes_with_other_hash_seeds(tmp_path):
    root = Path(generate_module.__file__).parents[3]
    for name, hash_seed, seed in (("one", "1", "7"), ("two", "2", "7"), ("other", "1", "8")):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(root)}
        subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / name), seed], env=environment, check=True)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert digests(tmp_path / "one")["pairs.jsonl"] != digests(tmp_path / "other")["pairs.jsonl"]


def test_the_readers_read_what_the_simulator_writes(data):
    demonstrations = load("demonstrations", Source(data.demonstrations)).records
    pairs, prompts = load("pairs", Source(data.pairs)).records, load("prompts", Source(data.prompts)).records
    assert (len(demonstrations), len(pairs), len(prompts)) == (120, 120, 120)
    assert {record.annotator for record in demonstrations} <= {who.id for who in PANEL}
    assert all(utility(record.metadata, record.messages[-1]["content"]).total > -28 for record in demonstrations)


def test_held_out_dialogues_occur_in_no_training_file(data):
    def prompts(path: Path) -> set[bytes]:
        return {dialogue_key(row["prompt"] if "prompt" in row else row["messages"][:-1]) for row in rows(path)}

    train = set.union(
        *(prompts(path) for path in (data.demonstrations, data.pairs, data.prompts, data.edits, data.scores))
    )
    held_out = prompts(data.held_out_prompts) | prompts(data.held_out_pairs)
    assert len(prompts(data.held_out_prompts)) == 60
    assert not train & held_out


def test_labels_agree_with_the_truth_about_as_often_as_noise_allows(data):
    pairs = load("pairs", Source(data.pairs)).records
    right = [
        utility(pair.metadata, pair.chosen[-1]["content"]).total
        > utility(pair.metadata, pair.rejected[-1]["content"]).total
        for pair in pairs
    ]
    ceiling = pair_accuracy_ceiling(pairs)
    assert 0.65 < ceiling < 0.97
    assert ceiling - 0.2 < sum(right) / len(right) < ceiling + 0.1


def test_rankings_scores_and_edits_have_their_shapes(data):
    for row in rows(data.rankings):
        assert sorted(index for place in row["order"] for index in place) == list(range(len(row["responses"])))
    for row in rows(data.scores):
        assert {row["overall"], *row["aspects"].values()} <= {1, 2, 3, 4, 5}
    edits = rows(data.edits)
    gains = [
        utility(row["metadata"], row["edited"]).total - utility(row["metadata"], row["original"]).total for row in edits
    ]
    assert sum(gains) > 0
    assert all(row["edited"] != row["original"] for row in edits)


def test_a_folder_with_files_is_refused_and_left_alone(data):
    before = digests(data.pairs.parent)
    with pytest.raises(FileExistsError, match="not empty"):
        simulate(data.pairs.parent, 3, SMALL)
    assert digests(data.pairs.parent) == before


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("disk full")

    monkeypatch.setattr(generate_module, "_score", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        simulate(tmp_path / "data", 0, SMALL)
    assert list(tmp_path.iterdir()) == []
