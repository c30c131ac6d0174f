"""Following a file that others write: new records are read once, damage is reported, deleted records are forgotten."""

from __future__ import annotations

import os

import pytest

from rlhf_ray.runs.jsonl import JsonLines
from rlhf_ray.runs.tail import Tail, fingerprint


class Followed:
    def __init__(self, path):
        self.records: list[int] = []
        self.taken = 0
        self.tail = Tail(path, self.take, self.records.clear)

    def take(self, record):
        if record["step"] < 0:
            raise ValueError("a negative step")
        self.taken += 1
        self.records.append(record["step"])

    def advance(self) -> list[int]:
        self.tail.read_new()
        return self.records


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def write(path, *steps, mode="a"):
    with open(path, mode) as file:
        file.writelines(f'{{"step": {step}}}\n' for step in steps)


def test_each_record_is_read_once_however_often_one_looks(path):
    followed = Followed(path)
    assert followed.advance() == []
    for step in range(200):
        write(path, step)
        followed.advance()
        followed.advance()
    assert followed.records == list(range(200)) and followed.taken == 200


def test_a_line_counts_when_it_has_its_end(path):
    followed = Followed(path)
    path.write_text('{"step": 1}\n{"st')
    assert followed.advance() == [1]
    path.write_text('{"step": 1}\n{"step": 2}\n')
    assert followed.advance() == [1, 2] and followed.taken == 2
    assert followed.tail.problems == []


def test_a_log_that_resumed_earlier_is_read_anew(path):
    write(path, 1, 2, 3, 4)
    followed = Followed(path)
    followed.advance()
    with_resume = JsonLines(path, keep_until_step=2)
    with_resume.append({"step": 3})
    with_resume.append({"step": 40})
    with_resume.append({"step": 50})
    assert followed.advance() == [1, 2, 3, 40, 50]


def test_another_file_of_the_same_name_and_inode_is_another_file(path):
    write(path, 1, 2, 3)
    followed = Followed(path)
    followed.advance()
    inode = os.stat(path).st_ino
    write(path, 7, 8, 9, 10, mode="w")
    assert os.stat(path).st_ino == inode
    assert followed.advance() == [7, 8, 9, 10]


def test_a_deleted_file_leaves_nothing(path):
    write(path, 1)
    followed = Followed(path)
    followed.advance()
    path.unlink()
    assert followed.advance() == [] and fingerprint(path) is None
    write(path, 5)
    assert followed.advance() == [5]


def test_damage_is_named_passed_over_and_forgotten_when_mended(path):
    path.write_text('{"step": 1}\nnonsense\n{"step": -4}\n[1]\n{"step": 2}\n')
    followed = Followed(path)
    assert followed.advance() == [1, 2]
    first, second, third = followed.tail.problems
    assert f"{path}, line 2: not JSON" in first
    assert second == f"{path}, line 3: a negative step" and "line 4" in third
    write(path, 1, 2, 3, 4, 5, 6, mode="w")
    assert followed.advance() == [1, 2, 3, 4, 5, 6] and followed.tail.problems == []
    with open(path, "a") as file:
        file.write("x\n" * 20)
    followed.advance()
    assert len(followed.tail.problems) == 6 and followed.tail.problems[-1] == f"{path}: 15 more lines are damaged."
