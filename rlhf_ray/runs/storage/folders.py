"""Transfers whole folders, that is models and checkpoints, to and from a store.

Invariants: a folder on a store is complete only if it has a manifest, the SHA-256 of each of its files. Object stores cannot
rename, so the manifest is empty while files are changed and is written last. Every downloaded file is compared with its digest.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from rlhf_ray.errors import InputError
from rlhf_ray.runs.atomic_checkpoint import file_sha256
from rlhf_ray.runs.storage.location import copy_folder, is_reference, working_folder
from rlhf_ray.runs.storage.store import Store

MANIFESTS = ".manifests"
"""Folder of the manifests, `NAME.json` for each folder, on a store and in a node's working folder."""
Manifest = dict[str, str]
"""SHA-256 by file name."""


class IncompleteFolder(InputError, ValueError):
    """A folder on a store is missing, incomplete or damaged."""


def fetch(model: str) -> str:
    """The local folder of a model: a path is returned as it is; a reference (`portable`) is downloaded first.

    Raises:
        IncompleteFolder, StoreFailed: the folder cannot be downloaded.
    """
    if not is_reference(model):
        return model
    uri, _, name = model.partition("#")
    return str(fetch_folder(Store(uri), working_folder(uri), name))


def fetch_copy(model: str, weights: bool = True) -> str:
    """Like `fetch`, for processes outside of the run that only read: the copy is separate from the run's working folder.

    Args:
        weights: False downloads only the configuration and the tokenizer.
    """
    if not is_reference(model):
        return model
    uri, _, name = model.partition("#")
    needed = _all_files if weights else without_weights
    return str(fetch_folder(Store(uri), copy_folder(uri), name, needed))


def _all_files(file: str) -> bool:
    return True


def without_weights(file: str) -> bool:
    """Selects the files of a model that are not weights."""
    return not file.endswith(".safetensors")


def fetch_folder(store: Store, run: Path, name: str, needed: Callable[[str], bool] = _all_files) -> Path:
    """Download the needed files of a folder to this node, except for those that it already has.

    Only one process of a node downloads; others wait. Files appear one by one, and the note that they are complete comes last.

    Args:
        run: local folder of the run.

    Raises:
        IncompleteFolder: the folder is not complete on the store, or a file differs from the manifest.
    """
    with _exclusive(run, name):
        wanted = read_manifest(store, name)
        if wanted is None:
            raise IncompleteFolder(f"{store.uri}/{name} does not exist, or its upload was not finished")
        if _local_manifest(run, name) == wanted and all(
            (run / name / file).is_file() for file in wanted if needed(file)
        ):
            return run / name
        for file, digest in wanted.items():
            if needed(file):
                _fetch_file(store, run, f"{name}/{file}", digest)
        _write_local_manifest(run, name, wanted)
    return run / name


def upload_folder(store: Store, run: Path, name: str, remote: Mapping[str, str] | None = None) -> bool:
    """Make a folder on the store equal to the local one.

    Args:
        run: local folder of the run.
        remote: manifest of further files of the folder, which other nodes have uploaded already.

    Returns:
        Whether the folder on the store was missing or different.
    """
    wanted = file_digests(run / name) | dict(remote or {})
    existing = read_manifest(store, name)
    if existing != wanted:
        mark_incomplete(store, name)
        upload_files(store, run, name, existing or {})
        for file in (existing or {}).keys() - wanted.keys():
            store.delete(f"{name}/{file}")
        store.put_text(f"{MANIFESTS}/{name}.json", json.dumps(wanted, indent=1))
    _write_local_manifest(run, name, wanted)
    return existing != wanted


def upload_files(store: Store, run: Path, name: str, existing: Mapping[str, str] | None = None) -> Manifest:
    """Upload the local files of a folder, except for `existing` ones, without marking the folder as complete."""
    files = file_digests(run / name)
    for file, digest in files.items():
        if (existing or {}).get(file) != digest:
            store.put_file(run / name / file, f"{name}/{file}")
    return files


def mark_incomplete(store: Store, name: str) -> None:
    """Mark a folder on the store as incomplete, before its files change."""
    store.put_text(f"{MANIFESTS}/{name}.json", "")


def delete_folder(store: Store, name: str) -> None:
    """Delete a folder from the store."""
    mark_incomplete(store, name)
    for file in store.names(name):
        store.delete(file)
    store.delete(f"{MANIFESTS}/{name}.json")


def folder_names(store: Store) -> list[str]:
    """Names of all folders on the store, complete or not."""
    names = store.names(MANIFESTS)
    return [name.removeprefix(f"{MANIFESTS}/").removesuffix(".json") for name in names]


def read_manifest(store: Store, name: str) -> Manifest | None:
    """The manifest of a folder on the store; None if the folder does not exist or is incomplete.

    Raises:
        IncompleteFolder: the manifest is damaged, or names a file outside of the folder.
    """
    text = store.text(f"{MANIFESTS}/{name}.json")
    try:
        files = None if not text else {str(file): str(digest) for file, digest in json.loads(text).items()}
    except (ValueError, AttributeError) as error:
        raise IncompleteFolder(f"{store.uri}/{name} is damaged: its manifest cannot be read ({error})") from error
    for file in files or ():
        check_inside(store, file)
    return files


def check_inside(store: Store, name: str) -> None:
    """Reject file names that lead out of the folder. Whoever can write to the bucket can choose names.

    Raises:
        IncompleteFolder: the name is absolute or contains `..`.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise IncompleteFolder(f"{store.uri} is damaged: the file name {name!r} in it leads outside of its folder")


def file_digests(folder: Path) -> Manifest:
    """SHA-256 of every file in a local folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}


def _local_manifest(run: Path, name: str) -> Manifest | None:
    """The manifest of a local folder when it was last uploaded or downloaded."""
    path = run / MANIFESTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _write_local_manifest(run: Path, name: str, files: Manifest) -> None:
    path = run / MANIFESTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(files, indent=1))
    temporary.replace(path)


def _fetch_file(store: Store, run: Path, name: str, digest: str) -> None:
    path = run / name
    if path.is_file() and file_sha256(path) == digest:
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        store.get_file(name, temporary)
        if file_sha256(temporary) != digest:
            raise IncompleteFolder(f"{store.uri}/{name} is damaged: it does not match its SHA-256")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _exclusive(run: Path, name: str) -> Iterator[None]:
    """Let only one process of this node transfer a folder at a time."""
    lock = run / MANIFESTS / f"{name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
