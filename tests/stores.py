"""Real servers of object stores, each in a process of its own; fixtures of all tests."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


class Server:
    """Answers on a port of this machine; what it holds is lost when it stops."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        raise NotImplementedError

    def start(self) -> None:
        self.process = subprocess.Popen(self.command(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while not self._answers():
            assert self.process.poll() is None and time.monotonic() < deadline, "the server did not start"
            time.sleep(0.1)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(self.url, timeout=1).close()
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
        return True


class S3Server(Server):
    """moto's, with one bucket, `runs`."""

    def command(self) -> list[str]:
        return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]

    def start(self) -> None:
        super().start()
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/runs", method="PUT"), timeout=10).close()


class GoogleServer(Server):
    """gcp-storage-emulator's, with one bucket, `runs`."""

    def command(self) -> list[str]:
        place = ["--host=127.0.0.1", f"--port={self.port}", "--in-memory", "--default-bucket=runs"]
        return [sys.executable, "-m", "gcp_storage_emulator", "start", *place]


@contextmanager
def environment(settings: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    yield
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


@pytest.fixture(scope="session")
def s3_server():
    """Started before Ray where a test wants both, so that Ray's processes know where it is."""
    server = S3Server()
    settings = {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "canary-7f31",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_REGION": "us-east-1",
    }
    with environment(settings):
        server.start()
        yield server
        server.stop()


@pytest.fixture(scope="session")
def google_server():
    server = GoogleServer()
    with environment({"STORAGE_EMULATOR_HOST": server.url}):
        server.start()
        yield server
        server.stop()
