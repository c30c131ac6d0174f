"""URIs of stores, and where what they hold lies on each node.

Invariants: on every node a URI has exactly one place below the working root, so a URI is a reference that any process of a run
understands; no URI holds a secret.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from rlhf_ray.errors import InputError

SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "file")
"""Of `pyarrow.fs.FileSystem.from_uri`."""
WORKING_ROOT = "RLHF_RAY_WORKING_FOLDER"
"""Environment variable, of each node: where runs whose folder is on a store work."""
_ORIGIN = ".uri"
"""In a place below the working root: the URI that it stands for."""


class NotAStore(InputError, ValueError):
    """A URI names no store that can be used."""


def is_uri(text: str | Path) -> bool:
    """Whether it names a store, and no path."""
    return "://" in str(text)


def is_reference(model: str | Path) -> bool:
    """Whether it names a folder of a run on a store: `URI of the run#name in it`, as `portable` does."""
    uri, mark, name = str(model).partition("#")
    return bool(mark and name) and is_uri(uri)


def check_uri(uri: str) -> None:
    """Refuse what is no URI of a store, without looking at the network.

    Raises:
        NotAStore: saying what is wrong and allowed; without what may be a password.
    """
    scheme, _, rest = uri.partition("://")
    user, at, _ = rest.partition("@")
    if at and (
        ":" in user or scheme not in ("abfs", "abfss")
    ):  # abfs://container@account is Azure's way to name a place
        raise NotAStore(
            f"a {scheme}:// URI with credentials in it; they would be written into logs. Leave them out: they are taken from the "
            "environment (AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, …) or from the machine's role"
        )
    if "?" in rest or "#" in rest:
        raise NotAStore(
            f"{uri.split('?')[0].split('#')[0]!r} is followed by options; set them in the environment, such as AWS_ENDPOINT_URL "
            "and AWS_REGION, and end the URI here"
        )
    if scheme not in SCHEMES:
        raise NotAStore(
            f"{uri!r}: unknown scheme {scheme!r}; allowed are {', '.join(SCHEMES)}, or a path without a scheme"
        )
    if not rest.strip("/") or (scheme == "file" and not rest.startswith("/")):
        raise NotAStore(f"{uri!r} names no place; expected such as s3://bucket/runs or file:///mnt/runs")


def working_root() -> Path:
    """Of this node."""
    return Path(os.environ.get(WORKING_ROOT) or "~/.cache/rlhf_ray/runs").expanduser().absolute()


def working_folder(uri: str) -> Path:
    """Where the run folder `uri` lies on this node; the place is marked, so that `portable` finds its way back."""
    parent, _, name = uri.rstrip("/").rpartition("/")
    place = working_root() / _digest(parent)
    place.mkdir(parents=True, exist_ok=True)
    if not (place / _ORIGIN).is_file():
        temporary = place / f"{_ORIGIN}.{os.getpid()}"
        temporary.write_text(parent)
        temporary.replace(place / _ORIGIN)
    return place / name


def copy_folder(uri: str) -> Path:
    """Where a command that only reads a run folder copies it to, on this node."""
    parent, _, name = uri.rstrip("/").rpartition("/")
    return working_root() / "copies" / _digest(parent) / name


def watched_folder(uri: str) -> Path:
    """Where the logs of a run, or of all runs below a URI, are kept up to be looked at, on this node."""
    return working_root() / "watched" / _digest(uri) / uri.rpartition("/")[2]


def copy_of(reference: str) -> Path:
    """Where commands and engines that only read a folder of a run on a store have it, on every node."""
    uri, _, name = reference.partition("#")
    return copy_folder(uri) / name


def portable(path: str | Path) -> str:
    """The reference to a path, for other nodes: `URI of the run#name in it` in a working folder, else the path itself."""
    path, root = Path(path), working_root()
    if not path.is_relative_to(root) or len(path.relative_to(root).parts) < 2:
        return str(path)
    place, run, *names = path.relative_to(root).parts
    mark = root / place / _ORIGIN
    return f"{mark.read_text()}/{run}#{'/'.join(names)}" if mark.is_file() else str(path)


def local(reference: str | Path) -> Path:
    """Where a reference lies on this node, whether it is there or not."""
    uri, _, name = str(reference).partition("#")
    return working_folder(uri) / name if is_reference(reference) else Path(reference)


def _digest(uri: str) -> str:
    return hashlib.sha256(uri.encode()).hexdigest()[:16]
