"""The live page's server: what may be asked for, by whom, and what it costs when nothing has changed."""

from __future__ import annotations

import json
import re
import time
from html import unescape

import pytest
from fastapi.testclient import TestClient

from rlhf_ray.report.live.app import build_app
from rlhf_ray.report.reader import RunReader
from rlhf_ray.runs.events import EventLog
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.serving.guard import digest

KEY = "a-key-of-the-test-suite"


def make_run(path, steps=3, text="x"):
    folder = RunFolder(path)
    folder.path.mkdir(parents=True)
    folder.config.write_text(f"name: {path.name}\nstages: [sft, ppo]\nppo: {{steps: 10}}\nmodel: {text}\n")
    add_steps(folder, range(1, steps + 1))
    with EventLog(folder.events) as log:
        log.emit("stage", "ppo begins")
        log.emit("fault", "a worker died")
    return folder


def add_steps(folder, steps):
    with open(folder.metrics, "a") as file:
        file.writelines(
            json.dumps({"step": step, "timestamp": 1.7e9 + step, "reward/mean": 0.1 * step}) + "\n" for step in steps
        )


@pytest.fixture
def root(tmp_path):
    make_run(tmp_path / "runs" / "first")
    make_run(tmp_path / "runs" / "second", 5)
    (tmp_path / "runs" / "not a run").mkdir()
    make_run(tmp_path / "elsewhere", text="a secret")
    return tmp_path / "runs"


@pytest.fixture
def client(root):
    return TestClient(build_app(root, None), base_url="http://127.0.0.1", follow_redirects=False)


def test_the_list_says_where_each_run_stands(client, root):
    html = client.get("/").text
    assert "2 runs" in html and "3 of 10" in html and "5 of 10" in html and "not a run" not in html
    with EventLog(RunFolder(root / "first").events) as log:
        log.emit("stage", "ppo ends", seconds=1.0)
    assert len(re.findall("ppo ended", client.get("/").text)) == 1


def test_one_run_is_its_report_and_several_are_compared(client):
    assert "3 PPO steps" in client.get("/runs?run=first").text
    both = client.get("/runs?run=first&run=second").text
    assert "2 runs" in both and "RLHF runs side by side" in both
    assert "runs?run=second" in both, "a way back to each"


def test_a_page_is_sent_again_only_when_a_file_behind_it_has_changed(client, root):
    for place, other in (("/", None), ("/runs?run=first", "second"), ("/runs?run=first&run=second", None)):
        sent = client.get(place)
        known = {"if-none-match": sent.headers["etag"]}
        idle = client.get(place, headers=known)
        assert idle.status_code == 304 and idle.content == b"" and idle.headers["etag"] == sent.headers["etag"]
        if other:
            add_steps(RunFolder(root / other), [6])
            assert client.get(place, headers=known).status_code == 304, "another run's step is nothing to this page"
        add_steps(RunFolder(root / "first"), [len((root / "first" / "metrics.jsonl").read_text().splitlines()) + 1])
        assert client.get(place, headers=known).status_code == 200


def test_a_fault_is_on_the_curve_when_one_looks_again(client, root):
    def faults():
        html = unescape(client.get("/runs?run=first").text)
        return json.loads(re.search(r'aria-label="Faults so far" data-hover="(\[.*?\])">', html)[1])[0]["text"]

    assert faults() == ["0", "0", "1"]
    with EventLog(RunFolder(root / "first").events) as log:
        log.emit("fault", "another died")
    assert faults() == ["0", "0", "2"]
    (root / "first" / "events.jsonl").unlink()
    assert faults() == ["0", "0", "0"]


def test_a_long_run_is_parsed_once(client, root, monkeypatch):
    long = make_run(root / "long", 0)
    add_steps(long, range(1, 20_001))
    client.get("/runs?run=long")
    monkeypatch.setattr("rlhf_ray.runs.tail.parse_line", lambda line, *place: seen.append(line) or json.loads(line))
    seen: list[bytes] = []
    add_steps(long, [20_001])
    assert "20,001 PPO steps" in client.get("/runs?run=long").text
    assert len(seen) == 1


@pytest.mark.parametrize(
    "name", ["../elsewhere", "..", ".", "/etc", "first/../../elsewhere", "..%2felsewhere", "not a run", "", "a\0b"]
)
def test_nothing_outside_can_be_named(client, name):
    answer = client.get("/runs", params={"run": name})
    assert answer.status_code == 404 and "a secret" not in answer.text


@pytest.mark.parametrize("file", [None, "config.yaml"])
def test_a_link_leads_nowhere_outside(client, root, file):
    if file is None:
        (root / "linked").symlink_to(root.parent / "elsewhere")
    else:
        (root / "linked").mkdir()
        (root / "linked" / file).symlink_to(root.parent / "elsewhere" / file)
    assert "linked" not in client.get("/").text
    assert client.get("/runs?run=linked").status_code == 404


def test_only_get_and_only_what_there_is(client):
    for method in ("post", "put", "delete", "patch", "head", "options"):
        assert getattr(client, method)("/runs?run=first").status_code == 405
    assert client.get("/runs").status_code == 400 and client.get("/nothing").status_code == 404
    assert client.get("/docs").status_code == 404 and client.get("/openapi.json").status_code == 404
    many = client.get("/runs?" + "&".join(["run=first"] * 65))
    assert many.status_code == 400


def test_damage_is_reported_and_the_rest_is_shown(client, root):
    with open(root / "first" / "metrics.jsonl", "a") as file:
        file.write("<b>nonsense\n")
    add_steps(RunFolder(root / "first"), [4])
    (root / "first" / "evaluation.json").write_text("{")
    html = client.get("/runs?run=first").text
    assert "4 PPO steps" in html and "metrics.jsonl, line 4: not JSON" in html and "evaluation.json: not JSON" in html
    assert "metrics.jsonl, line 4" in client.get("/runs?run=first&run=second").text
    (root / "first" / "events.jsonl").write_text("damaged\n")
    listed = client.get("/").text
    assert "events.jsonl, line 1: not JSON" in listed and "5 of 10" in listed
    (root / "first" / "events.jsonl").write_text('{"time": 1.0}\n')
    assert "events.jsonl, line 1: no &#39;kind&#39;" in client.get("/").text
    (root / "second" / "config.yaml").write_text("")
    assert "config.yaml is damaged: empty" in client.get("/").text


def test_a_deleted_run_is_reported_as_gone(client, root):
    client.get("/runs?run=first")
    (root / "first").rename(root.parent / "gone")
    gone = client.get("/runs?run=first")
    assert gone.status_code == 404 and "or no longer" in gone.text and "1 run<" in client.get("/").text


def test_a_file_with_unexpected_content_is_a_reported_error(root):
    client = TestClient(build_app(root, None), base_url="http://127.0.0.1", raise_server_exceptions=False)
    (root / "first" / "evaluation.json").write_text('{"win_rate_vs_sft": "high"}')
    answer = client.get("/runs?run=first")
    assert answer.status_code == 500 and "This page could not be drawn" in answer.text
    assert client.get("/runs?run=second").status_code == 200


def test_one_run_can_be_watched_alone(root):
    client = TestClient(build_app(root / "second", None), base_url="http://127.0.0.1")
    assert "1 run<" in client.get("/").text and "5 PPO steps" in client.get("/runs?run=second").text
    assert client.get("/runs?run=first").status_code == 404


def test_without_keys_only_this_machine_is_answered(root):
    assert TestClient(build_app(root, None), base_url="http://rebound.example").get("/").status_code == 400
    assert TestClient(build_app(root, None), base_url="http://localhost:8266").get("/").status_code == 200


def test_a_page_may_load_nothing_and_not_be_framed(client):
    for place in ("/", "/runs?run=first", "/nothing"):
        policy = client.get(place).headers["content-security-policy"]
        assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "frame-ancestors 'none'" in policy
        assert "unsafe-inline" not in policy.split("script-src")[1]


class TestKeys:
    @pytest.fixture
    def guarded(self, root):
        return TestClient(
            build_app(root, {digest(KEY): "suite"}), base_url="http://watch.example", follow_redirects=False
        )

    def test_nothing_is_shown_without_one(self, guarded):
        for place in ("/", "/runs?run=first", "/nothing", "/?key=wrong", "/runs?run=first&key="):
            answer = guarded.get(place)
            assert answer.status_code == 401 and ">first<" not in answer.text and "set-cookie" not in answer.headers
        assert guarded.get("/", headers={"cookie": f"rlhf_ray_key={digest(KEY)}"}).status_code == 401

    def test_a_key_in_the_address_becomes_a_cookie(self, guarded):
        answer = guarded.get("/runs", params=[("run", "first"), ("key", KEY), ("run", "second")])
        assert answer.status_code == 303 and answer.headers["location"] == "runs?run=first&run=second"
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=strict" in cookie and "Path=/" in cookie
        assert guarded.get("/", params={"key": KEY}).headers["location"] == "./"
        page = guarded.get("/runs?run=first").text
        assert "3 PPO steps" in page and ">first<" in page, "the client has the cookie now"

    def test_programs_show_it_in_a_header(self, guarded):
        assert guarded.get("/", headers={"authorization": f"Bearer {KEY}"}).status_code == 200
        assert guarded.get("/", headers={"authorization": "Bearer other"}).status_code == 401


def test_a_hundred_thousand_steps_are_drawn_while_one_watches(tmp_path):
    """A step that is added to a long run costs what is new, and the drawing."""
    long = make_run(tmp_path / "long", 0)
    names = [f"time/{number}_s" for number in range(20)]
    line = json.dumps({"step": 1, "timestamp": 1.0, "reward/mean": 0.5} | dict.fromkeys(names, 0.25)) + "\n"
    long.metrics.write_text("".join(line.replace('"step": 1', f'"step": {s}') for s in range(1, 100_001)))
    reader = RunReader(long)
    assert len(reader.read().stages["ppo"]) == 100_000
    add_steps(long, [100_001])
    began = time.perf_counter()
    assert reader.read().stages["ppo"].last_step == 100_001
    assert time.perf_counter() - began < 0.5
