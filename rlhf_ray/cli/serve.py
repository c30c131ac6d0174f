"""`rlhf-ray serve`, and the commands for a running endpoint: `publish`, `promote`, `rollback`, `versions`, `unserve`."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf_ray.cli.app import SERVE, Overrides, check_port, command

if TYPE_CHECKING:
    from rlhf_ray.config.serving import ServingConfig
    from rlhf_ray.serving.versions import Version, Versions

Model = Annotated[str, typer.Argument(help="A run's folder, or a Hugging Face folder", show_default=False)]
Label = Annotated[
    str | None, typer.Option(help="Name of the version; default: the run's name with its step", show_default=False)
]
Address = Annotated[str, typer.Option(help="Ray cluster that serves the endpoint; auto: the one on this machine")]
Name = Annotated[str, typer.Option(help="Name of the endpoint")]


@command(SERVE, "rlhf-ray serve runs/quickstart port=8000")
def serve(
    target: Model,
    overrides: Overrides = None,
    config: Annotated[Path | None, typer.Option(help="YAML config of the endpoint", show_default=False)] = None,
    label: Label = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="Ray cluster to serve on; it keeps serving after this command. Default: a private one",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option(help="Print the endpoint as a config file of Ray Serve, start nothing")
    ] = False,
) -> None:
    """Serve a policy with OpenAI's API: chat, completions, streaming, models; and scores of a reward model."""
    from rlhf_ray.config.loading import load_serving
    from rlhf_ray.models.loading import check_model_folder, check_reward_model
    from rlhf_ray.runs.storage.folders import fetch_copy
    from rlhf_ray.serving.deploying import find_version

    settings, version = load_serving(config, overrides or []), find_version(target, label)
    if settings.reward_model is not None:
        folder = fetch_copy(settings.reward_model, weights=False)
        if folder == settings.reward_model:
            check_model_folder(folder, "reward_model")
        check_reward_model(folder, None)
    if dry_run:
        _print_config(settings, version)
        return
    keys, made = _keys(settings)
    _start(address, settings.port)
    from rlhf_ray.serving.endpoint import Endpoint
    from rlhf_ray.telemetry.console import console

    endpoint = Endpoint(settings, keys)
    with console.status(f"starting engines of {version.name}"):
        endpoint.start(version)
    print(f"serving {version.name} as {settings.name!r} at http://{settings.host}:{settings.port}/v1")
    if made is not None:
        print(f"key      {made}   (shown only once; set {settings.keys_env} to use your own)")
    if address is not None:
        return
    print("stop     Ctrl-C")
    # SIGTERM ends it like Ctrl-C: its engines must not outlive it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        print("stopping")
    finally:
        _end()


@command(SERVE, "rlhf-ray publish runs/quickstart --canary 10%")
def publish(
    target: Model,
    canary: Annotated[str, typer.Option(help="Share of the traffic for the new version, such as 10%")] = "100%",
    label: Label = None,
    name: Name = "policy",
    address: Address = "auto",
) -> None:
    """Add a new version to a running endpoint, without losing a request."""
    from rlhf_ray.serving.deploying import find_version

    share, version = share_of(canary), find_version(target, label)
    _connect(address)
    from rlhf_ray.serving.endpoint import Endpoint

    _show(Endpoint.attach(name).publish(version, share))


@command(SERVE, "rlhf-ray promote")
def promote(name: Name = "policy", address: Address = "auto") -> None:
    """Give the candidate all the traffic. The version before it stays available for a rollback."""
    _connect(address)
    from rlhf_ray.serving.endpoint import Endpoint

    _show(Endpoint.attach(name).promote())


@command(SERVE, "rlhf-ray rollback")
def rollback(name: Name = "policy", address: Address = "auto") -> None:
    """Remove the candidate. If there is none, return to the previous version."""
    _connect(address)
    from rlhf_ray.serving.endpoint import Endpoint

    _show(Endpoint.attach(name).roll_back())


@command(SERVE, "rlhf-ray unserve --name policy")
def unserve(name: Name = "policy", address: Address = "auto") -> None:
    """Stop an endpoint that `serve --address` started, after it has answered its open requests."""
    _connect(address)
    from rlhf_ray.serving.endpoint import Endpoint

    Endpoint.attach(name).stop()
    print(f"stopped serving {name}")


@command(SERVE, "rlhf-ray versions")
def versions(name: Name = "policy", address: Address = "auto") -> None:
    """List the versions of an endpoint and their shares of the traffic."""
    _connect(address)
    from rlhf_ray.serving.endpoint import Endpoint

    _show(Endpoint.attach(name).versions)


def share_of(text: str) -> float:
    """Parse `10%` or `0.1` as a share above 0 and at most 1."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise typer.BadParameter(f"{text!r} is not a share; write it like 10% or 0.1, above 0 and at most 100%")
    return share


def _print_config(settings: ServingConfig, version: Version) -> None:
    import yaml

    from rlhf_ray.serving.declarative import serve_config
    from rlhf_ray.serving.versions import Versions

    print(yaml.safe_dump(serve_config(settings, Versions(version)), sort_keys=False), end="")


def _keys(settings: ServingConfig) -> tuple[dict[str, str] | None, str | None]:
    """Names of callers by the digest of their keys (None: no key is needed), and the key that was generated if none is set."""
    from rlhf_ray.serving.guard import digest, new_key, read_keys

    if settings.keys_env is None:
        return None, None
    keys = read_keys(settings.keys_env)
    if keys:
        return keys, None
    made = new_key()
    return {digest(made): "default"}, made


def _start(address: str | None, port: int) -> None:
    """Start a private Ray, or attach to a cluster and send it this package, so that both sides have the same version."""
    import ray

    import rlhf_ray
    from rlhf_ray.runtime.cluster import attach, local_runtime_env

    if address is not None:
        return attach(address, log_to_driver=False, runtime_env={"py_modules": [rlhf_ray]})
    check_port(port)
    ray.init(address="local", include_dashboard=False, log_to_driver=False, runtime_env=local_runtime_env())


def _connect(address: str) -> None:
    from rlhf_ray.runtime.cluster import attach

    attach(address, log_to_driver=False)


def _end() -> None:
    import ray
    from ray import serve as ray_serve

    ray_serve.shutdown()
    ray.shutdown()


def _show(versions: Versions) -> None:
    from rich.table import Table

    from rlhf_ray.telemetry.console import console

    table = Table("version", "traffic", "folder")
    table.add_row(versions.stable.name, f"{1 - versions.share:.0%}", versions.stable.folder)
    if versions.candidate is not None:
        table.add_row(versions.candidate.name, f"{versions.share:.0%}, candidate", versions.candidate.folder)
    if versions.previous is not None:
        table.add_row(versions.previous.name, "0%, for a rollback", versions.previous.folder)
    console.print(table)
