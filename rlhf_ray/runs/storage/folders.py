"""Whole folders on a store: models and checkpoints.

Invariants: a folder counts only when its manifest, the SHA-256 of each of its files, is there; object stores cannot rename, so
the manifest is empty as long as files come or go, and is written last; what was fetched has been compared with it, byte by byte.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from rlhf_ray.errors import InputError
from rlhf_ray.runs.storage.location import copy_folder, is_reference, working_folder
from rlhf_ray.runs.storage.store import Store

MANIFESTS = ".manifests"
"""Below it, in a store and in the working folder of a node: `NAME.json` of each folder."""
Manifest = dict[str, str]
"""Names of files to their SHA-256."""


class NotWhole(InputError, ValueError):
    """A folder on a store is missing, unfinished or damaged."""


def manifest(store: Store, name: str) -> Manifest | None:
    """Of a folder; None where it is not there, or not whole."""
    text = store.text(f"{MANIFESTS}/{name}.json")
    try:
        files = None if not text else {str(file): str(digest) for file, digest in json.loads(text).items()}
    except (ValueError, AttributeError) as error:
        raise NotWhole(f"{store.uri}/{name} is damaged: its manifest is none ({error})") from error
    for file in files or ():
        check_inside(store, file)
    return files


def check_inside(store: Store, name: str) -> None:
    """Refuse a name that would lead out of the folder that it is written to; whoever writes to a bucket chooses names.

    Raises:
        NotWhole: it is absolute, or has `..` in it.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise NotWhole(f"{store.uri} is damaged: a file in it is named {name!r}, outside of its folder")


def folders(store: Store) -> list[str]:
    """Names of all, whole or not."""
    names = store.names(MANIFESTS)
    return [name.removeprefix(f"{MANIFESTS}/").removesuffix(".json") for name in names]


def put_folder(store: Store, run: Path, name: str, elsewhere: Mapping[str, str] | None = None) -> bool:
    """Make a folder of the store equal to that of a working folder.

    Args:
        run: working folder of the run.
        elsewhere: files of it that other nodes have put into the store already.

    Returns:
        Whether it was not there, or differed.
    """
    wanted = digests(run / name) | dict(elsewhere or {})
    there = manifest(store, name)
    if there != wanted:
        begin(store, name)
        put_files(store, run, name, there or {})
        for file in (there or {}).keys() - wanted.keys():
            store.delete(f"{name}/{file}")
        store.put_text(f"{MANIFESTS}/{name}.json", json.dumps(wanted, indent=1))
    _note(run, name, wanted)
    return there != wanted


def begin(store: Store, name: str) -> None:
    """From now on the folder is not whole."""
    store.put_text(f"{MANIFESTS}/{name}.json", "")


def put_files(store: Store, run: Path, name: str, there: Mapping[str, str] | None = None) -> Manifest:
    """Put what this node has of a folder, without declaring it whole; files that are `there` are left out."""
    files = digests(run / name)
    for file, digest in files.items():
        if (there or {}).get(file) != digest:
            store.put_file(run / name / file, f"{name}/{file}")
    return files


def fetch_folder(store: Store, run: Path, name: str, needed: Callable[[str], bool] = lambda file: True) -> Path:
    """Bring a folder, or the files of it that are needed, to this node; files that it has already stay.

    Once per node: other processes wait meanwhile. Files appear one by one, the note that all are there last.

    Raises:
        NotWhole: it is not whole in the store, or differs from its manifest.
    """
    with _alone(run, name):
        wanted = manifest(store, name)
        if wanted is None:
            raise NotWhole(f"{store.uri}/{name} is not there, or was not written to its end")
        if noted(run, name) == wanted and all((run / name / file).is_file() for file in wanted if needed(file)):
            return run / name
        for file, digest in wanted.items():
            if needed(file):
                _fetch(store, run, f"{name}/{file}", digest)
        _note(run, name, wanted)
    return run / name


def delete_folder(store: Store, name: str) -> None:
    """Remove it."""
    begin(store, name)
    for file in store.names(name):
        store.delete(file)
    store.delete(f"{MANIFESTS}/{name}.json")


def fetch(model: str) -> str:
    """The folder of a model on this node: a path as it is, and of a reference (`portable`) what the store holds, fetched.

    Raises:
        NotWhole, StoreFailed: it cannot be had.
    """
    if not is_reference(model):
        return model
    uri, _, name = model.partition("#")
    return str(fetch_folder(Store(uri), working_folder(uri), name))


def copy_here(model: str, weights: bool = True) -> str:
    """As `here`, for those who are not of the run and only read: in a copy that the run does not work in.

    Args:
        weights: whether more is wanted than configuration and tokenizer.
    """
    if not is_reference(model):
        return model
    uri, _, name = model.partition("#")
    needed = (lambda file: True) if weights else (lambda file: not file.endswith(".safetensors"))
    return str(fetch_folder(Store(uri), copy_folder(uri), name, needed))


def digests(folder: Path) -> Manifest:
    """SHA-256 of every file of a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): _sha256(path) for path in files}


def noted(run: Path, name: str) -> Manifest | None:
    """What this node has of a folder, as it was when it was last put or fetched."""
    path = run / MANIFESTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _fetch(store: Store, run: Path, name: str, digest: str) -> None:
    path = run / name
    if path.is_file() and _sha256(path) == digest:
        return
    arriving = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        store.get_file(name, arriving)
        if _sha256(arriving) != digest:
            raise NotWhole(f"{store.uri}/{name} is damaged: it does not match its SHA-256")
        arriving.replace(path)
    finally:
        arriving.unlink(missing_ok=True)


def _note(run: Path, name: str, wanted: Manifest) -> None:
    path = run / MANIFESTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(wanted, indent=1))
    temporary.replace(path)


@contextmanager
def _alone(run: Path, name: str) -> Iterator[None]:
    lock = run / MANIFESTS / f"{name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
