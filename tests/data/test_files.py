"""File types: JSONL, CSV and Parquet give the same rows, and are read only as far as needed."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from rlhf_ray.data.readers import Source, load
from rlhf_ray.data.rows import DataError, Malformed, load_rows

ROWS = [
    {"prompt": "When does it\ncome?", "chosen": "On Monday.", "rejected": "[sic] Who knows.", "group": "cooks"},
    {"prompt": "And “the other”?", "chosen": "On Tuesday.", "rejected": "Never.", "group": None},
]
GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl"


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
def test_every_file_type_gives_the_same_records(tmp_path, write):
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


def test_brackets_in_a_text_are_text_but_turns_are_turns(tmp_path):
    path = tmp_path / "pairs.csv"
    turns = json.dumps([{"role": "user", "content": "Sort 2, 1."}])
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "chosen", "rejected"], [turns, "[1, 2]", '{"a": 1}']])
    [pair] = load("pairs", Source(path)).records
    assert pair.prompt[0]["content"] == "Sort 2, 1."
    assert (pair.chosen[0]["content"], pair.rejected[0]["content"]) == ("[1, 2]", '{"a": 1}')


def test_turns_in_python_notation_are_refused(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text("""prompt\n"[{'role': 'user', 'content': 'Hi'}]"\n""")
    with pytest.raises(DataError, match="line 2: prompt holds turns in Python's notation; write such cells as JSON"):
        load("prompts", Source(path))


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_byte_order_mark_is_skipped(tmp_path, kind):
    path = tmp_path / f"prompts.{kind}"
    path.write_text({"csv": "prompt\nHi\n", "jsonl": '{"prompt": "Hi"}\n'}[kind], encoding="utf-8-sig")
    assert load("prompts", Source(path)).records[0].messages[0]["content"] == "Hi"


def test_broken_quotes_and_bytes_make_one_row_each_malformed(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_bytes(b'prompt,id\na,1\n"b" c,2\n\xff,3\n\nlong ' + b"x" * 200_000 + b",4\n" + b'"open,5\n')
    rows = list(load_rows(path))
    assert [(row.number, getattr(row, "reason", "")[:9]) for row in rows] == [
        (2, ""), (3, "not CSV: "), (4, "not UTF-8"), (6, ""), (7, "not CSV: ")
    ]  # fmt: skip


def test_a_column_that_is_twice_in_the_header(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text("prompt,prompt\na,b\n")
    with pytest.raises(DataError, match="line 1: a column is twice"):
        load("prompts", Source(path))


def test_rows_of_parquet_are_counted_and_nulls_are_absent(tmp_path):
    path = tmp_path / "scores.parquet"
    rows = [
        {"prompt": "a", "response": "b", "scores": {"tone": 1.0, "truth": None}, "weight": None},
        {"prompt": "a", "response": "b", "scores": None, "weight": 2.0},
    ]
    parquet.write_table(arrow.Table.from_pylist(rows), path)
    loaded = load("scores", Source(path, on_malformed="quarantine", quarantine=tmp_path / "bad.jsonl"))
    assert [(r.scores, r.weight) for r in loaded.records] == [({"tone": 1.0}, 1.0)]
    assert json.loads((tmp_path / "bad.jsonl").read_text())["row"] == 2
    with pytest.raises(DataError, match=r"scores\.parquet, row 2: no rating.*Correct the row"):
        load("scores", Source(path))


def test_a_file_that_is_not_parquet_is_refused(tmp_path):
    path = tmp_path / "prompts.parquet"
    path.write_text("prompt\nHi\n")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        load("prompts", Source(path))


@pytest.mark.parametrize("limit", [None, 2])
def test_a_data_set_of_the_hub_is_read_by_its_own_library(tmp_path, monkeypatch, limit):
    """From a local clone: the same call as for a hub name, without a network."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    write_jsonl(folder / "train.jsonl")
    (folder / "test.jsonl").write_text(json.dumps({"prompt": "x", "chosen": "y", "rejected": "z", "group": "q"}) + "\n")
    pairs = load("pairs", Source(str(folder), limit=limit)).records
    assert [p.group for p in pairs] == ["cooks", None]
    assert len(load("pairs", Source(str(folder), split="test", limit=limit)).records) == 1
    with pytest.raises(DataError, match="split 'validation'"):
        load("pairs", Source(str(folder), split="validation", limit=limit))


def test_a_limit_stops_the_reading(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\nnot read\n')
    assert [r.messages[0]["content"] for r in load("prompts", Source(path, limit=2)).records] == ["a", "b"]


@pytest.mark.skipif(not GSM8K.is_file(), reason="needs the shared GSM8K file")
def test_the_real_questions():
    prompts = load("prompts", Source(GSM8K)).records
    assert len(prompts) == 7473 and len({p.id for p in prompts}) == 7473
    assert all("####" in p.metadata["answer"] for p in prompts)
