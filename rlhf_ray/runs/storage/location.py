"""URIs of stores, and the local path on each node of what they hold.

Invariants: on every node a URI has exactly one local path below the working root, so a URI is a reference that all processes of
a run understand; no URI holds a secret.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from rlhf_ray.errors import InputError

SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "file")
"""Schemes of `pyarrow.fs.FileSystem.from_uri`."""
WORKING_ROOT = "RLHF_RAY_WORKING_FOLDER"
"""Environment variable of each node: where runs whose folder is on a store keep their local files."""
_ORIGIN = ".uri"
"""File in each folder below the working root that holds the URI to which the folder belongs."""


class NotAStore(InputError, ValueError):
    """A URI does not name a store that can be used."""


def is_uri(text: str | Path) -> bool:
    """Whether the text is a URI and not a path."""
    return "://" in str(text)


def is_reference(model: str | Path) -> bool:
    """Whether the text has the form `URI of a run#name in it`, as `portable` returns it."""
    uri, mark, name = str(model).partition("#")
    return bool(mark and name) and is_uri(uri)


def check_uri(uri: str) -> None:
    """Check the form of a URI without using the network.

    Raises:
        NotAStore: the message says what is wrong and what is allowed; it never contains what may be a password.
    """
    scheme, _, rest = uri.partition("://")
    user, at, _ = rest.partition("@")
    if at and (":" in user or scheme not in ("abfs", "abfss")):  # Azure names places as abfs://container@account
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
        raise NotAStore(f"{uri!r} names no place; expected a URI such as s3://bucket/runs or file:///mnt/runs")


def working_root() -> Path:
    """The working root of this node."""
    return Path(os.environ.get(WORKING_ROOT) or "~/.cache/rlhf_ray/runs").expanduser().absolute()


def working_folder(uri: str) -> Path:
    """The local folder in which the run at `uri` works. Its parent notes the URI, so that `portable` finds it again."""
    parent, _, name = uri.rstrip("/").rpartition("/")
    place = working_root() / _digest(parent)
    place.mkdir(parents=True, exist_ok=True)
    if not (place / _ORIGIN).is_file():
        temporary = place / f"{_ORIGIN}.{os.getpid()}"
        temporary.write_text(parent)
        temporary.replace(place / _ORIGIN)
    return place / name


def copy_folder(uri: str) -> Path:
    """The local folder into which commands that only read the run at `uri` copy it."""
    parent, _, name = uri.rstrip("/").rpartition("/")
    return working_root() / "copies" / _digest(parent) / name


def watched_folder(uri: str) -> Path:
    """The local folder in which the logs of a run, or of all runs below a URI, are kept up to date for viewing."""
    return working_root() / "watched" / _digest(uri) / uri.rpartition("/")[2]


def copy_of(reference: str) -> Path:
    """The local copy of a referenced folder, for commands and engines that only read it."""
    uri, _, name = reference.partition("#")
    return copy_folder(uri) / name


def portable(path: str | Path) -> str:
    """What other nodes understand: `URI of the run#name in it` for a path in a working folder, else the path itself."""
    path, root = Path(path), working_root()
    if not path.is_relative_to(root) or len(path.relative_to(root).parts) < 2:
        return str(path)
    place, run, *names = path.relative_to(root).parts
    origin = root / place / _ORIGIN
    return f"{origin.read_text()}/{run}#{'/'.join(names)}" if origin.is_file() else str(path)


def local(reference: str | Path) -> Path:
    """The path of a reference on this node, whether it exists or not."""
    uri, _, name = str(reference).partition("#")
    return working_folder(uri) / name if is_reference(reference) else Path(reference)


def _digest(uri: str) -> str:
    return hashlib.sha256(uri.encode()).hexdigest()[:16]
