"""Which cluster a command uses, and how it refuses invalid addresses."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import ray
from ray._private import services
from typer.testing import CliRunner

from rlhf_ray.cli import app
from rlhf_ray.errors import InputError
from rlhf_ray.jobs.cluster import RayCluster
from rlhf_ray.jobs.connection import ClusterRefused
from rlhf_ray.runtime.addresses import AddressRefused, check_answers, jobs_address, unset
from rlhf_ray.runtime.cluster import NotAttached, attach


class JobsApi(BaseHTTPRequestHandler):
    """The part of a dashboard that lists no jobs."""

    def do_GET(self) -> None:
        body = json.dumps({"ray_version": ray.__version__} if self.path == "/api/version" else []).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@contextmanager
def jobs_api() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), JobsApi)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """An environment without a cluster and a token."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def closed_port() -> int:
    """A port of this machine on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("variable", ["RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"])
def test_the_argument_wins_over_the_environment(monkeypatch, closed_port, variable):
    elsewhere = f"http://127.0.0.1:{closed_port}"
    with jobs_api() as address:
        monkeypatch.setenv(variable, elsewhere)
        cluster = RayCluster(address)
        assert cluster.address == address and cluster.attempts() == []
        assert os.environ[variable] == elsewhere, "and stays as it is for others"
        with pytest.raises(ClusterRefused, match=elsewhere):
            RayCluster()
        monkeypatch.setenv(variable, address)
        assert RayCluster().address == address


@pytest.mark.parametrize(
    "address", ["nonsense", "http://127.0.0.1:99999", "http://", "http://h:x", "127.0.0.1:8265", "ftp://h:1", ""]
)
def test_an_address_that_is_not_a_jobs_api_is_refused_with_valid_examples(address):
    with pytest.raises(AddressRefused) as refused:
        RayCluster(address)
    assert f"--address {address}:" in str(refused.value) and "http://HOST:8265" in str(refused.value)


def test_a_wrong_variable_is_named():
    with pytest.raises(AddressRefused, match="RAY_ADDRESS=nonsense.*http://HOST:8265"):
        jobs_address(None, {"RAY_ADDRESS": "nonsense"})
    assert jobs_address(None, {"RAY_ADDRESS": "10.0.0.1:6379"}) == "10.0.0.1:6379"
    assert jobs_address(None, {"RAY_ADDRESS": "a:1", "RAY_API_SERVER_ADDRESS": "http://b"}) == "http://b"
    assert jobs_address(None, {}) is None


def test_a_server_that_is_not_a_jobs_api_is_named(monkeypatch):
    monkeypatch.setattr(JobsApi, "do_GET", lambda self: self.send_error(500))
    with jobs_api() as address, pytest.raises(ClusterRefused, match=address):
        RayCluster(address)


@pytest.mark.parametrize("address", [None, "auto"])
def test_it_does_not_wait_for_a_cluster_that_has_ended(monkeypatch, closed_port, address):
    monkeypatch.setattr(services, "find_gcs_addresses", frozenset)
    monkeypatch.setattr(services, "find_bootstrap_address", lambda _: f"127.0.0.1:{closed_port}")
    with pytest.raises(
        AddressRefused, match=f":{closed_port}: nothing answers there.*last cluster of this machine.*http://HOST:8265"
    ):
        RayCluster(address)
    with pytest.raises(
        AddressRefused, match=f":{closed_port}: nothing answers there.*last cluster of this machine.*ray://HOST:10001"
    ):
        attach("auto")


@pytest.mark.parametrize("address", ["nonsense", "http://127.0.0.1:8265", "h:99999", "ray://h", "local", "", "h:0"])
def test_an_address_that_no_driver_can_attach_to_is_refused_with_valid_examples(address):
    with pytest.raises(AddressRefused, match="auto on a node.*HOST:PORT.*ray://HOST:10001") as refused:
        attach(address)
    assert repr(address) in str(refused.value)


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_it_does_not_wait_where_nothing_answers(closed_port, scheme):
    with pytest.raises(AddressRefused, match=f"{scheme}127.0.0.1:{closed_port}: nothing answers there"):
        attach(f"{scheme}127.0.0.1:{closed_port}")


def test_auto_ignores_a_jobs_api_and_says_so_if_there_is_no_cluster(monkeypatch):
    monkeypatch.setattr(services, "find_gcs_addresses", frozenset)
    monkeypatch.setattr(services, "find_bootstrap_address", lambda _: None)
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(
        AddressRefused, match="no node .* on this machine.*RAY_ADDRESS=http://127.0.0.1:8265 is the jobs API"
    ):
        attach("auto")
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    with pytest.raises(AddressRefused, match="RAY_ADDRESS=nonsense is not the address"):
        attach("auto")


def test_a_cluster_that_ray_cannot_join_is_an_input_error(monkeypatch):
    def refuse(address: str, namespace: str) -> None:
        raise ConnectionError(f"no {address} for {namespace}")

    monkeypatch.setattr(ray, "init", refuse)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(NotAttached, match=f"no {address} for run; allowed: auto"):
            attach(address, namespace="run")


def test_variables_are_restored_after_errors(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "a")
    with pytest.raises(KeyError), unset("RAY_ADDRESS", "NEVER_SET"):
        assert "RAY_ADDRESS" not in os.environ
        raise KeyError
    assert os.environ["RAY_ADDRESS"] == "a" and "NEVER_SET" not in os.environ


def test_names_that_do_not_resolve_are_named():
    with pytest.raises(AddressRefused, match="no-such-host.invalid:6379: nothing answers there"):
        check_answers("no-such-host.invalid:6379", "allowed: this")


@pytest.mark.parametrize("made", [False, True])
def test_a_folder_without_a_run_is_refused_before_any_cluster_is_contacted(tmp_path, monkeypatch, made):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    if made:
        (tmp_path / "runs" / "nope").mkdir(parents=True)
    result = CliRunner().invoke(app, ["status", "runs/nope"])
    assert isinstance(result.exception, InputError) and "127.0.0.1" not in str(result.exception)
    assert f"{tmp_path / 'runs' / 'nope'} {'holds no run' if made else 'does not exist'}" in str(result.exception)
