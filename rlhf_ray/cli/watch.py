"""`rlhf-ray report` writes a page about one run or several; `rlhf-ray watch` shows live pages in a browser."""

from __future__ import annotations

import signal
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from rlhf_ray.cli.app import LOOK, check_port, command

KEYS = "RLHF_RAY_API_KEYS"


@command(LOOK, "rlhf-ray report runs/a runs/b --output comparison.html")
def report(
    folders: Annotated[list[str], typer.Argument(help="A run's folder by path or URI, or several", show_default=False)],
    output: Annotated[
        Path | None, typer.Option(help="Where to write it; default: report.html in the run, comparison.html here")
    ] = None,
) -> None:
    """Write a run's report.html again, or one page that compares several runs."""
    from rlhf_ray.report import output_file, write_comparison, write_report
    from rlhf_ray.runs.run_folder import RunFolderError
    from rlhf_ray.runs.storage.session import read_run

    # Checked first: copying a run from a store takes time.
    target = None if output is None else output_file(output)
    runs = [read_run(folder) for folder in folders]
    for run in runs:
        if not run.holds_run:
            raise RunFolderError(f"{run.path} is not a run's folder: it has no config.yaml")
    if len(runs) == 1:
        print(write_report(runs[0], target))
    else:
        print(write_comparison(runs, target or Path("comparison.html")))


@command(LOOK, "rlhf-ray watch runs")
def watch(
    folder: Annotated[str, typer.Argument(help="A folder of runs, or one run, by path or URI")] = "runs",
    host: Annotated[str, typer.Option(help="Address to listen on; any but 127.0.0.1 needs a key")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on", min=1, max=65535)] = 8266,
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster that serves the page, such as auto; default: a private one", show_default=False),
    ] = None,
) -> None:
    """Show the runs of a folder in a browser, live, with the curves of the report."""
    from rlhf_ray.runs.run_folder import RunFolderError
    from rlhf_ray.runs.storage.following import followed
    from rlhf_ray.runs.storage.location import is_uri

    if is_uri(folder):
        with followed(folder, partial(print, flush=True)) as copies:
            _show(copies, host, port, address)
        return
    if not Path(folder).is_dir():
        raise RunFolderError(f"{folder} is not a folder; give a run's folder, or the folder that contains runs")
    _show(Path(folder), host, port, address)


def _show(folder: Path, host: str, port: int, address: str | None) -> None:
    _connect(address, port)
    from rlhf_ray.report.live.app import LiveSite

    site = LiveSite.open(folder, host, port, KEYS, shared=address is not None)
    # SIGTERM ends it like Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        print(f"watch    {site.start()}")
        if site.made_key:
            print(f"         the key is shown only once; set {KEYS} to use your own")
        print("stop     Ctrl-C", flush=True)
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        print("stopping")
    finally:
        site.stop()
        _disconnect()


def _connect(address: str | None, port: int) -> None:
    import ray

    from rlhf_ray.runtime.cluster import attach, local_runtime_env

    if address is None:
        check_port(port)
        own = {"num_cpus": 1, "include_dashboard": False, "runtime_env": local_runtime_env()}
        ray.init(address="local", log_to_driver=False, **own)
    else:
        attach(address, log_to_driver=False)


def _disconnect() -> None:
    import ray

    ray.shutdown()
