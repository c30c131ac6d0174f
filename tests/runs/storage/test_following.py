"""Local copies of the logs of runs on a store are kept up to date."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from rlhf_ray.report.live.runs import Runs
from rlhf_ray.runs.run_folder import RunFolderError
from rlhf_ray.runs.storage.folders import upload_folder
from rlhf_ray.runs.storage.following import followed, refresh
from rlhf_ray.runs.storage.store import Store, StoreFailed

SERVERS = {"s3": "s3_server", "gs": "google_server"}
CONFIG = "name: {}\nstages: [ppo]\nppo: {{steps: 4}}\n"
pytestmark = pytest.mark.usefixtures("working_root")


@pytest.fixture(params=SERVERS)
def uri(request) -> str:
    """The URI of a folder with two runs."""
    request.getfixturevalue(SERVERS[request.param])
    uri = f"{request.param}://runs/followed/{request.node.originalname}"
    for name in ("a", "b"):
        Store(f"{uri}/{name}").put_text("config.yaml", CONFIG.format(name))
    return uri


def steps(count: int) -> str:
    return "".join(f'{{"step": {step}, "timestamp": {step}}}\n' for step in range(1, count + 1))


def shown(root: Path) -> dict[str, int | None]:
    return {row.name: row.status.step for row in Runs(root).rows()}


def within(seconds: float, condition) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_runs_grow_appear_and_go(uri, tmp_path):
    run = Store(f"{uri}/a")
    model = tmp_path / "run" / "reward_model"
    model.mkdir(parents=True)
    for name in ("config.json", "quality.json", "model.safetensors"):
        (model / name).write_text("{}")
    upload_folder(run, tmp_path / "run", "reward_model")
    with followed(uri, print, every_s=0.1) as root:
        assert shown(root) == {"a": None, "b": None}
        assert sorted(path.name for path in (root / "a" / "reward_model").iterdir()) == ["config.json", "quality.json"]
        run.put_text("metrics.jsonl", steps(2))
        within(20, lambda: shown(root)["a"] == 2)
        Store(f"{uri}/c").put_text("config.yaml", CONFIG.format("c"))
        Store(f"{uri}/b").delete("config.yaml")
        within(20, lambda: shown(root) == {"a": 2, "c": None})
    run.put_text("metrics.jsonl", steps(3))
    with followed(f"{uri}/a", print) as root:
        assert shown(root) == {"a": 3}


def test_only_what_changed_is_fetched_again(uri, tmp_path, monkeypatch):
    store, fetched = Store(f"{uri}/a"), []
    get_file = Store.get_file
    monkeypatch.setattr(Store, "get_file", lambda self, name, path: fetched.append(name) or get_file(self, name, path))
    store.put_text("metrics.jsonl", steps(1))
    for expected in (["config.yaml", "metrics.jsonl"], [], ["metrics.jsonl"]):
        assert refresh(store, tmp_path / "copy")
        assert sorted(fetched) == expected
        fetched.clear()
        store.put_text("metrics.jsonl", steps(2)) if not expected else None


def test_a_uri_without_a_run_is_refused(uri):
    with pytest.raises(RunFolderError, match="holds no run"), followed(f"{uri}/nothing", print):
        pass


@pytest.mark.engine
@pytest.mark.parametrize("uri", ["s3"], indirect=True)
def test_an_outage_is_reported_once(s3_server, uri):
    said: list[str] = []
    with followed(uri, said.append, every_s=0.1) as root:
        s3_server.stop()
        within(30, lambda: said)
        assert shown(root) == {"a": None, "b": None}
        s3_server.start()
        Store(f"{uri}/a").put_text("config.yaml", CONFIG.format("a"))
        within(60, lambda: len(said) == 2)
    assert "does not answer" in said[0] and "answers again" in said[1]
    s3_server.stop()
    with pytest.raises(StoreFailed), followed(uri, print):
        pass
    s3_server.start()


def test_a_run_that_cannot_be_read_does_not_hide_the_others(uri, tmp_path):
    said: list[str] = []
    Store(f"{uri}/a").put_text(".manifests/policy.json", "no manifest")
    assert refresh(Store(uri), tmp_path / "copy", said.append)
    assert "a/policy is damaged" in said[0] and set(shown(tmp_path / "copy")) == {"a", "b"}
    for name in Store(f"{uri}/a").names():
        Store(f"{uri}/a").delete(name)
    assert refresh(Store(uri), tmp_path / "copy", said.append) and len(said) == 1
    assert set(shown(tmp_path / "copy")) == {"b"}
