"""Several runs on one page are distinguishable and complete, and none hides what another has."""

from __future__ import annotations

import json
import re
from html import unescape

import pytest
from typer.testing import CliRunner

from rlhf_ray.cli import app
from rlhf_ray.report.comparison import ComparisonError, labels_of, write_comparison
from rlhf_ray.runs.run_folder import RunFolder

ATTACK = "<script>alert('x')</script>\"'</style>{{ 7 * 7 }}"


def make_run(path, steps, evaluated=True, config="seed: 0\n", prompts=("Where is it?",), **figures):
    folder = RunFolder(path)
    folder.path.mkdir(parents=True)
    folder.config.write_text(f"name: {path.name}\n{config}")
    lines = ({"step": s, "timestamp": 1.7e9 + s, "reward/mean": s / 10, **figures} for s in range(1, steps + 1))
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if evaluated:
        found = {
            "win_rate_vs_sft": 0.9,
            "win_rate_interval": [0.85, 0.94],
            "kl_sequence": 4.5,
            "seconds": {"ppo": 71.0},
        }
        folder.evaluation.write_text(json.dumps(found))
        rows = [
            {"prompt": [{"role": "user", "content": text}], "answers": {"sft": "Sorry.", "ppo": f"{path.name} says"}}
            for text in prompts
        ]
        folder.evaluation_samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def compare(tmp_path, *folders) -> str:
    return write_comparison(folders, tmp_path / "all.html").read_text(encoding="utf-8")


def charts(html: str) -> dict[str, list[dict]]:
    found = re.findall(r'<svg class="chart"[^>]*aria-label="([^"]*)" data-hover="([^"]*)"', html)
    return {unescape(title): json.loads(unescape(hover)) for title, hover in found}


def table_row(html: str, label: str) -> list[str]:
    (row,) = re.findall(rf'<tr><th scope="row">{re.escape(label)}</th>(.*?)</tr>', html)
    return [unescape(cell) for cell in re.findall(r"<td><b>(.*?)</b>", row)]


def test_runs_of_different_length_share_a_chart_with_a_line_each(tmp_path):
    short = make_run(tmp_path / "short", 5, **{"clip": 0.1})
    long = make_run(tmp_path / "long", 1000, evaluated=False, **{"value/loss": 0.5})
    drawn = charts(compare(tmp_path, short, long))
    reward = {line["label"]: line for line in drawn["Reward"]}
    assert reward["short"]["step"] == [1, 2, 3, 4, 5] and reward["long"]["step"][-1] == 1000
    assert reward["short"]["x"][0] == reward["long"]["x"][0] and reward["short"]["x"][-1] < 60, "one axis"
    assert (reward["short"]["colour"], reward["long"]["colour"]) == (1, 2)
    assert [(line["label"], line["colour"]) for line in drawn["Value loss"]] == [("long", 2)], "its colour everywhere"


def test_faults_are_a_line_for_every_run(tmp_path):
    one, two = make_run(tmp_path / "one", 3), make_run(tmp_path / "two", 2)
    event = {"time": 1.7e9 + 1.5, "kind": "fault", "message": "a worker died", "fields": {}}
    one.events.write_text(json.dumps(event) + "\n")
    faults = {line["label"]: line for line in charts(compare(tmp_path, one, two))["Faults so far"]}
    assert (faults["one"]["text"], faults["two"]["text"]) == (["0", "1", "1"], ["0", "0"])
    assert (faults["one"]["colour"], faults["two"]["colour"]) == (1, 2)


def test_figures_stand_side_by_side_and_a_dash_where_there_is_none(tmp_path):
    html = compare(tmp_path, make_run(tmp_path / "one", 3), make_run(tmp_path / "two", 4, evaluated=False))
    assert table_row(html, "Win rate against SFT") == ["90.0\u202f%", "—"]
    assert table_row(html, "PPO steps") == ["3", "4"]
    assert table_row(html, "Time: PPO") == ["1m11s", "—"]
    assert table_row(html, "Faults") == ["0", "0"]
    assert "85.0\u202f% to 94.0\u202f%" in html and "Hidden utility" not in html


def test_only_the_keys_that_differ_are_shown(tmp_path):
    one = make_run(tmp_path / "one", 1, config="seed: 0\nppo: {steps: 9, kl: {coefficient: 0.1}}\nstages: [sft, ppo]\n")
    two = make_run(tmp_path / "two", 1, config="seed: 0\nppo: {steps: 9, kl: {coefficient: 0.2}}\nstages: [ppo]\n")
    html = compare(tmp_path, one, two)
    assert table_row(html, "ppo.kl.coefficient") == ["0.1", "0.2"]
    assert table_row(html, "stages") == ['["sft", "ppo"]', '["ppo"]']
    assert not re.search(r'<th scope="row">(seed|name|ppo.steps)</th>', html)


def test_answers_to_shared_prompts_stand_together(tmp_path):
    one = make_run(tmp_path / "one", 1, prompts=("only mine", "ours"))
    two = make_run(tmp_path / "two", 1, prompts=("ours", "only theirs", "ours"))
    html = compare(tmp_path, one, two, make_run(tmp_path / "none", 1, evaluated=False))
    assert html.count("<article") == 1 and "ours" in html and "only" not in html.split('id="answers"')[1]
    assert "one says" in html and "two says" in html and "Sorry." not in html
    assert "no two of these runs" in compare(tmp_path, one, RunFolder(tmp_path / "none"))


def test_runs_that_hold_nothing_but_a_config(tmp_path):
    html = compare(tmp_path, make_run(tmp_path / "a", 0, False), make_run(tmp_path / "b", 0, False))
    assert "None of these runs has recorded a step yet" in html and "Nothing differs" in html


def test_equal_names_are_labelled_with_their_parents(tmp_path):
    paths = [tmp_path / "x" / "run", tmp_path / "y" / "run", tmp_path / "other", tmp_path / "y" / "z" / "run"]
    assert labels_of(paths) == ["x/run", "y/run", "other", "z/run"]
    deep = [tmp_path / "x" / "runs" / "a", tmp_path / "y" / "runs" / "a"]
    assert labels_of(deep) == ["x/runs/a", "y/runs/a"]
    with pytest.raises(ComparisonError, match="given twice"):
        labels_of([tmp_path / "a", tmp_path / "b" / ".." / "a"])
    with pytest.raises(ComparisonError, match="at most 8"):
        labels_of([tmp_path / str(number) for number in range(9)])


def test_texts_of_runs_are_escaped(tmp_path):
    one = make_run(tmp_path / "one <b>", 1, prompts=(ATTACK,), config=f"model: {json.dumps(ATTACK)}\n")
    html = compare(tmp_path, one, make_run(tmp_path / "two", 1, prompts=(ATTACK,)))
    assert html.count("<script>") == 1 and "one <b>" not in html and "alert('x')" not in html
    assert "http" not in html.replace("http-equiv", "") and "default-src &#39;none&#39;" in html


def test_the_command_writes_to_the_requested_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, two = make_run(tmp_path / "one", 1), make_run(tmp_path / "two", 2)
    said = CliRunner().invoke(app, ["report", str(one.path), str(two.path)], catch_exceptions=False)
    assert said.stdout.strip() == str(tmp_path / "comparison.html")
    CliRunner().invoke(app, ["report", "one", "two", "--output", "both.html"], catch_exceptions=False)
    assert (tmp_path / "both.html").read_bytes() == (tmp_path / "comparison.html").read_bytes()
    CliRunner().invoke(app, ["report", "one"], catch_exceptions=False)
    CliRunner().invoke(app, ["report", "one", "--output", "page.html"], catch_exceptions=False)
    assert (tmp_path / "page.html").read_bytes() == one.report.read_bytes()
    assert "one" in one.report.read_text() and CliRunner().invoke(app, ["report", "nowhere"]).exit_code != 0
