"""Reading data files: every format, and malformed files."""

from __future__ import annotations

import json

import pytest

from rlhf_ray.data.readers import Source, load
from rlhf_ray.data.rows import DataError, load_rows

ASK = {"role": "user", "content": "Where is it?"}
GOOD = {"role": "assistant", "content": "On its way."}
BAD = {"role": "assistant", "content": "Who knows."}
PAIR = {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD], "annotator": "a1", "group": "clerk", "metadata": {"k": 1}}
HH = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: Go away"}


@pytest.fixture
def write(tmp_path):
    def write(*rows, name="data.jsonl"):
        path = tmp_path / name
        path.write_text(
            "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
        )
        return path

    return write


def test_a_pairs_file_gives_pairs_demonstrations_and_prompts(write):
    path = write(PAIR)
    [pair] = load("pairs", Source(path)).records
    assert (pair.prompt, pair.chosen, pair.rejected) == ((ASK,), (GOOD,), (BAD,))
    assert (pair.annotator, pair.group, pair.metadata) == ("a1", "clerk", {"k": 1})
    assert load("demonstrations", Source(path)).records[0].messages == (ASK, GOOD)
    assert load("prompts", Source(path)).records[0].messages == (ASK,)


def test_a_messages_file_gives_demonstrations_and_prompts_but_no_pairs(write):
    path = write({"messages": [ASK, GOOD]})
    assert load("demonstrations", Source(path)).records[0].messages == (ASK, GOOD)
    assert load("prompts", Source(path, format="messages")).records[0].messages == (ASK,)
    with pytest.raises(DataError, match="format messages has no such records; formats that have them are pairs, hh"):
        load("pairs", Source(path))


def test_an_hh_file_is_detected_and_parsed(write):
    path = write(HH)
    [pair] = load("pairs", Source(path)).records
    assert pair.prompt == ({"role": "user", "content": "Hi"},)
    assert pair.rejected == ({"role": "assistant", "content": "Go away"},)
    assert load("demonstrations", Source(str(path))).records[0].messages[-1]["content"] == "Hello"


def test_prompt_ids_are_stable_and_unique(write):
    records = load("prompts", Source(write({"prompt": [ASK]}, {"prompt": [ASK]}, {"id": 7, "prompt": [ASK]}))).records
    again = load("prompts", Source(write({"prompt": [ASK]}, name="other.jsonl"))).records
    assert len({record.id for record in records}) == 3
    assert records[0].id == again[0].id
    assert records[2].id == "7"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{not json", "not JSON: Expecting property name.* column 2"),
        ("[1]", "not a JSON object but list"),
        ({"prompt": [ASK], "chosen": [GOOD]}, "no key 'rejected'"),
        (PAIR | {"chosen": 5}, "chosen must be a list of at least one turn, not 5"),
        (PAIR | {"chosen": [ASK]}, "chosen must end with a turn of the assistant"),
        (PAIR | {"prompt": [ASK, GOOD]}, "prompt must end with a turn to answer"),
        (
            PAIR | {"prompt": [{"role": "bot", "content": "x"}]},
            r"prompt\[0\].role must be one of system, user, assistant",
        ),
        (PAIR | {"prompt": [{"role": "user", "content": " "}]}, r"prompt\[0\].content must be text"),
        (PAIR | {"metadata": []}, "metadata must be an object"),
    ],
)
def test_a_malformed_line_is_fatal_with_its_number_or_quarantined(write, tmp_path, line, reason):
    path = write(PAIR, "", line, PAIR)
    with pytest.raises(DataError, match=rf"data.jsonl, line 3: {reason}"):
        load("pairs", Source(path))
    quarantine = tmp_path / "run" / "quarantine.jsonl"
    loaded = load("pairs", Source(path, on_malformed="quarantine", quarantine=quarantine))
    assert (len(loaded.records), loaded.quarantined) == (2, 1)
    [bad] = [json.loads(text) for text in quarantine.read_text(encoding="utf-8").splitlines()]
    assert bad["line"] == 3
    assert bad["text"] == (line if isinstance(line, str) else json.dumps(line))


def test_invalid_utf8_makes_one_line_malformed(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "\xff"}\n' + json.dumps({"prompt": [ASK]}).encode() + b"\n")
    loaded = load("prompts", Source(path, on_malformed="quarantine", quarantine=tmp_path / "bad.jsonl"))
    assert (len(loaded.records), loaded.quarantined) == (1, 1)
    assert "not UTF-8" in (tmp_path / "bad.jsonl").read_text(encoding="utf-8")


def test_nothing_readable_is_an_error_whatever_the_setting(write):
    with pytest.raises(DataError, match="is empty"):
        load("pairs", Source(write("", " ")))
    with pytest.raises(DataError, match="all 2 lines are malformed; line 1: unknown format: keys .'text'.; known are"):
        load("pairs", Source(write({"text": "x"}, "nonsense"), on_malformed="quarantine"))


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "/missing"])
def test_a_missing_file_is_not_looked_for_on_the_hub(name):
    with pytest.raises(FileNotFoundError, match="no data file at"):
        load_rows(name)


def test_a_folder_without_data_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        list(load_rows(str(tmp_path)))
