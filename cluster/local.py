"""A Ray cluster of several nodes on one machine: each node is a `ray start` of its own, token authentication is on.

    python cluster/local.py --nodes 2 --cpus 4        # prints how to use it; Ctrl-C ends it

What is tried on it works the same on real nodes: jobs are submitted over HTTP with a token, a run's actors are placed on several
nodes, a node can be killed. Nothing listens outside this machine.

Invariant: every process of the cluster ends with the `LocalCluster`, and no other cluster of this machine is touched.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType

RAY = "import sys; from ray.scripts.scripts import main; sys.exit(main())"
"""The command `ray`, by the interpreter that runs this file."""
HOST = "127.0.0.1"
TOKEN = Path("~/.ray/auth_token")
"""Where Ray looks for a token."""


class ClusterFailed(RuntimeError):
    """The cluster did not come up."""


class LocalCluster:
    """A head and further nodes. A context manager."""

    def __init__(
        self,
        nodes: int = 2,
        cpus: float = 2,
        token_file: Path = TOKEN,
        dashboard_port: int = 0,
        object_store_mb: int = 256,
    ) -> None:
        """`cpus` are those of each node, as Ray counts them. A `dashboard_port` of 0 takes a free one.

        Raises:
            ClusterFailed: a node ended, or did not join; the message has the end of what it said.
        """
        self.folder = Path(
            tempfile.mkdtemp(prefix="ray-")
        )  # short: sockets lie below it, and their paths are limited to 107
        self._cpus, self._store = cpus, object_store_mb << 20
        # Ray starts processes by a shell and does not quote the interpreter, whose path may have a space; this one has none.
        (self.folder / "env").symlink_to(sys.prefix, target_is_directory=True)
        self._python = self.folder / "env" / "bin" / Path(sys.executable).name
        self.token_file = token_file.expanduser().absolute()
        self.environment = os.environ | {
            # The token must be there before the head starts, or Ray starts without asking for one.
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(_token(self.token_file)),
            "PATH": f"{self._python.parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self.environment.pop("RAY_ADDRESS", None)
        port, self.dashboard_port = _free_port(), dashboard_port or _free_port()
        self.gcs_address, self.address = f"{HOST}:{port}", f"http://{HOST}:{self.dashboard_port}"
        self.nodes: list[subprocess.Popen] = []
        try:
            self._start(
                "--head", f"--port={port}", f"--dashboard-port={self.dashboard_port}", "--include-dashboard=true",
                f"--temp-dir={self.folder}", f"--ray-client-server-port={_free_port()}",
            )  # fmt: skip
            self._wait_for(1)
            for _ in range(nodes - 1):
                self.add_node()
        except BaseException:
            self.close()
            raise

    def add_node(self) -> None:
        """One more node."""
        self._start(f"--address={self.gcs_address}")
        self._wait_for(len(self.nodes))

    def kill_node(self) -> None:
        """End the newest node at once, as a machine that loses its power."""
        _kill(self.nodes.pop(), signal.SIGKILL)

    def close(self) -> None:
        """End all nodes, the newest first."""
        for node in reversed(self.nodes):
            node.terminate()
        deadline = time.monotonic() + 10
        for node in reversed(self.nodes):
            try:
                node.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                pass
            _kill(node, signal.SIGKILL)
        self.nodes.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> LocalCluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, *arguments: str) -> None:
        log = self.folder / f"node-{len(self.nodes)}.log"
        command = [
            str(self._python), "-c", RAY, "start", "--block", f"--node-ip-address={HOST}", f"--num-cpus={self._cpus:g}",
            "--num-gpus=0", f"--object-store-memory={self._store}", "--disable-usage-stats",
            # Several nodes share this machine's ports.
            "--node-manager-port=0", "--object-manager-port=0", "--min-worker-port=0", "--max-worker-port=0",
            f"--dashboard-agent-listen-port={_free_port()}", f"--dashboard-agent-grpc-port={_free_port()}",
            f"--runtime-env-agent-port={_free_port()}", f"--metrics-export-port={_free_port()}",
            *arguments,
        ]  # fmt: skip
        with open(log, "wb") as out:
            self.nodes.append(
                subprocess.Popen(command, env=self.environment, stdout=out, stderr=out, start_new_session=True)
            )

    def _wait_for(self, nodes: int, timeout_s: float = 120.0) -> None:
        deadline = time.monotonic() + timeout_s
        while self._alive() < nodes:
            dead = [number for number, node in enumerate(self.nodes) if node.poll() is not None]
            if dead or time.monotonic() > deadline:
                number = dead[0] if dead else len(self.nodes) - 1
                said = (self.folder / f"node-{number}.log").read_text(errors="replace")[-2000:]
                raise ClusterFailed(
                    f"node {number} of the cluster {'ended' if dead else 'did not join'}; it said:\n{said}"
                )
            time.sleep(0.25)

    def _alive(self) -> int:
        """Nodes that the dashboard knows as alive."""
        request = urllib.request.Request(
            f"{self.address}/api/v0/nodes?limit=1000",
            headers={"Authorization": f"Bearer {self.token_file.read_text().strip()}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                rows = json.load(response)["data"]["result"]["result"]
        except (urllib.error.URLError, OSError, ValueError):
            return 0
        return sum(row["state"] == "ALIVE" for row in rows)


def _token(path: Path) -> Path:
    """The file of the token, which is made where there is none. Only this user may read it."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
    return path


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def _kill(node: subprocess.Popen, how: signal.Signals) -> None:
    """The node's whole process group."""
    try:
        os.killpg(node.pid, how)
    except ProcessLookupError:
        pass
    node.wait()


def main() -> None:
    """Start a cluster, say how it is used, and keep it until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(description="A Ray cluster of several nodes on this machine.")
    parser.add_argument("--nodes", type=int, default=2, help="with the head (2)")
    parser.add_argument("--cpus", type=float, default=4, help="of each node, as Ray counts them (4)")
    parser.add_argument("--dashboard-port", type=int, default=8265, help="where jobs are submitted (8265)")
    parser.add_argument("--token-file", type=Path, default=TOKEN, help=f"made where there is none ({TOKEN})")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with LocalCluster(given.nodes, given.cpus, given.token_file, given.dashboard_port) as cluster:
            print(f"{given.nodes} nodes are up; Ctrl-C ends them. In another terminal:\n")
            print(
                f"  export RAY_ADDRESS={cluster.address} RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={cluster.token_file}"
            )
            print('  rlhf-ray submit configs/quickstart.yaml folder="$PWD/runs" --follow', flush=True)
            signal.pause()
    except KeyboardInterrupt:
        print("\nthe cluster has ended")


if __name__ == "__main__":
    main()
