"""`rlhf-ray data check`: its figures and its output."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from rlhf_ray.cli import app
from rlhf_ray.data.check import Leaks, check, read_all
from rlhf_ray.data.rows import DataError


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def pair(prompt, chosen, rejected, **label):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **label}


@pytest.fixture
def pairs(tmp_path):
    return write(
        tmp_path / "pairs.jsonl",
        pair("When?", "Monday.", "Who knows.", annotator="ann", group="cooks"),
        pair("When?", "Who knows.", "Monday.", annotator="bob"),
        pair("When?", "Monday.", "Who knows.", annotator="ann"),
        pair("Where?", "Here, where else.", "There.", preference=0.5),
        pair("Why?", "Because I say so.", "So.", preference=0.3),
        "not a row",
    )


def test_figures(pairs, tmp_path):
    other = read_all(write(tmp_path / "other.jsonl", {"prompt": " WHEN"}, {"prompt": "Who?"}))
    result = check(read_all(pairs), other)
    assert (result.format, result.kinds, result.rows) == ("pairs", ("pairs", "demonstrations", "prompts"), 5)
    assert [flaw.place for flaw in result.malformed] == ["line 6"]
    assert (result.repeated_prompts, result.repeated_rows, result.leaks) == (2, 1, Leaks(0, 3))
    assert result.annotators == {"ann": 2, "bob": 1} and result.groups == {"cooks": 1}
    assert (result.pairs.ties, result.pairs.soft, result.pairs.conflicting) == (1, 1, 3)
    # Decided: shorter, longer, shorter; and where the rejected one is probably better, that is the shorter one.
    assert result.pairs.longer_chosen == 0.25
    assert (result.answers.longest, result.prompts.longest) == (17, 6)


def test_nothing_readable(tmp_path):
    with pytest.raises(DataError, match="no readable row among 1; line 1: not JSON"):
        read_all(write(tmp_path / "bad.jsonl", "oops"))


def test_the_command_prints_the_figures_and_fails_on_malformed_lines(pairs, tmp_path, tiny_model):
    done = CliRunner().invoke(app, ["data", "check", pairs, "--model", str(tiny_model), "--limit", "12", "--rows", "1"])
    assert done.exit_code == 1
    for text in (
        "line 6: not JSON", "5, and 1 malformed", "above the limit", "repeated rows",
        "<|im_start|>assistant\n⟦Monday.<|im_end|>⟧", "[rejected] <|im_start|>user",
    ):  # fmt: skip
        assert text in done.stdout
    done = CliRunner().invoke(app, ["data", "check", pairs, "--json"])
    assert json.loads(done.stdout)["malformed"] == [
        {"place": "line 6", "reason": "not JSON: Expecting value at column 1"}
    ]
    good = write(tmp_path / "good.jsonl", {"prompt": "a"})
    done = CliRunner().invoke(app, ["data", "check", good, "--json", "--against", good])
    assert done.exit_code == 0 and json.loads(done.stdout)["rows"] == 1
    assert json.loads(done.stdout)["leaks"] == {"exact": 1, "normalised": 1}


def test_contradictions_are_found_in_either_order(tmp_path):
    contents = read_all(
        write(tmp_path / "p.jsonl", pair("a", "x", "y"), pair("a", "x", "y", preference=0), pair("a", "y", "z"))
    )
    assert check(contents).pairs.conflicting == 2


def test_rankings_are_shown_as_rankings(tmp_path):
    row = {"prompt": "a", "responses": ["x", "y"], "order": [1, 0]}
    assert read_all(write(tmp_path / "r.jsonl", row)).kinds == ("rankings", "pairs", "prompts")
