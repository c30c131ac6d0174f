"""The kinds of files: the same rows from JSONL, CSV and Parquet, read no further than needed."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from rlhf_ray.data.readers import DataError, Source, load
from rlhf_ray.data.rows import Malformed, load_rows

ROWS = [
    {"prompt": "When does it\ncome?", "chosen": "On Monday.", "rejected": "[sic] Who knows.", "group": "cooks"},
    {"prompt": "And “the other”?", "chosen": "On Tuesday.", "rejected": "Never.", "group": None},
]
GSM8K = Path("../shared/data/gsm8k/train.jsonl")


def write_jsonl(path):
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")


def write_csv(path):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path):
    parquet.write_table(arrow.Table.from_pylist(ROWS), path)


@pytest.mark.parametrize("write", [write_jsonl, write_csv, write_parquet])
def test_every_kind_of_file_holds_the_same(tmp_path, write):
    path = tmp_path / f"pairs.{write.__name__.removeprefix('write_')}"
    write(path)
    pairs = load("pairs", Source(path)).records
    assert [(p.prompt[0]["content"], p.rejected[0]["content"], p.group) for p in pairs] == [
        (row["prompt"], row["rejected"], row["group"]) for row in ROWS
    ]


def test_structures_in_csv_cells_are_json(tmp_path):
    path = tmp_path / "rankings.csv"
    path.write_text('prompt,responses,order\nWhy?,"[""a"", ""b""]","[[1], [0]]"\n')
    [ranking] = load("rankings", Source(path)).records
    assert ranking.ranks == (2, 1)


def test_rows_are_numbered_as_an_editor_numbers_lines(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text('prompt,chosen,rejected\n"two\nlines",a,b\nshort,a\nfine,a,b\n')
    rows = list(load_rows(path))
    assert [row.number for row in rows] == [2, 4, 5]
    assert isinstance(rows[1], Malformed) and "3 columns" in rows[1].reason
    with pytest.raises(DataError, match=r"pairs\.csv, line 4"):
        load("pairs", Source(path))
    assert load("pairs", Source(path, on_malformed="quarantine")).quarantined == 1


def test_a_limit_stops_the_reading(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\nnot read\n')
    assert [r.messages[0]["content"] for r in load("prompts", Source(path, limit=2)).records] == ["a", "b"]


@pytest.mark.skipif(not GSM8K.is_file(), reason="needs the shared GSM8K file")
def test_the_real_questions():
    prompts = load("prompts", Source(GSM8K)).records
    assert len(prompts) == 7473 and len({p.id for p in prompts}) == 7473
    assert all("####" in p.metadata["answer"] for p in prompts)
