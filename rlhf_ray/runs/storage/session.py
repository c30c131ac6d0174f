"""Opens a run whose folder may be on a store: takes the lease, downloads the run, and prepares the mirror; or reads a run.

Invariant: a run continues from what the store has, unless this machine was the last that wrote there. Then it continues from
its local files, which are never older.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_ray.config.run import RunConfig
from rlhf_ray.runs.atomic_checkpoint import NotACheckpoint
from rlhf_ray.runs.run_folder import RunFolder, RunFolderError, RunFolderTaken
from rlhf_ray.runs.storage.folders import (
    MANIFESTS,
    IncompleteFolder,
    check_inside,
    fetch_copy,
    fetch_folder,
    folder_names,
    read_manifest,
    without_weights,
)
from rlhf_ray.runs.storage.lease import LOCK, Lease
from rlhf_ray.runs.storage.location import copy_folder, is_uri, working_folder
from rlhf_ray.runs.storage.mirror import Mirror
from rlhf_ray.runs.storage.rank_files import REMOTE_FILES
from rlhf_ray.runs.storage.store import Store

Note = Callable[[str], None]
_NOT_READ = ("checkpoints", "published")
"""Folders of models that commands which read a run do not need."""


def run_folder(config: RunConfig) -> RunFolder:
    """The local folder in which a run works."""
    run = f"{config.folder.rstrip('/')}/{config.name}"
    return RunFolder(working_folder(run) if is_uri(run) else run)


@contextmanager
def claim_run_folder(config: RunConfig, resume: bool) -> Iterator[tuple[RunFolder, Mirror | None]]:
    """Hold a run's folder until the block ends, like `RunFolder.claim`; for one on a store also returns its mirror, not started.

    Raises:
        RunFolderBusy: another run is using it, here or elsewhere.
        RunFolderTaken: a new run would overwrite an earlier one.
        StoreFailed: the store cannot be reached or written to.
        IncompleteFolder, NotACheckpoint: a model on the store is damaged, or all checkpoints are.
    """
    folder = run_folder(config)
    if not is_uri(config.folder):
        with folder.claim(resume):
            yield folder, None
        return
    store = Store(f"{config.folder.rstrip('/')}/{config.name}")
    with folder.claim(resume=True):
        lease = Lease.take(store, folder.path)
        try:
            warnings = _prepare_working_folder(store, folder.path, lease, resume)
            yield folder, Mirror(folder.path, store, lease, warnings)
        finally:
            lease.release()


def _prepare_working_folder(store: Store, folder: Path, lease: Lease, resume: bool) -> tuple[str, ...]:
    """Bring the working folder into the run's initial state; returns a warning for each damaged checkpoint skipped."""
    exists = store.modified_at("config.yaml") is not None
    if exists and not resume:
        raise RunFolderTaken(
            f"{store.uri} already holds a run. Continue it with --resume, or choose another name for this one; to begin again "
            "under the same name, delete or move what is there first."
        )
    warnings: list[str] = []
    if not (resume and lease.local_is_newest):
        _clear(folder)
        if exists:
            download_run(store, folder, warnings.append)
    lease.mark_local_newest()
    return tuple(warnings)


def download_run(store: Store, folder: Path, note: Note) -> None:
    """Download logs, models, and the newest intact checkpoint of each kind to an empty working folder.

    Args:
        note: called with a message for each damaged checkpoint that is skipped.

    Raises:
        IncompleteFolder: a model is damaged.
        NotACheckpoint: all checkpoints of one kind are damaged.
    """
    names = folder_names(store)
    # Simulated data must be complete or missing, which single files do not ensure; the seed generates the same data again.
    _download_files(store, folder, [*names, "data"])
    steps: dict[str, list[int]] = {}
    for name in names:
        parent, _, last = name.rpartition("/")
        if parent.startswith("checkpoints") and last.startswith("step_"):
            steps.setdefault(parent, []).append(int(last.removeprefix("step_")))
        elif read_manifest(store, name) is not None:
            fetch_folder(store, folder, name)
    for parent, numbers in steps.items():
        _download_newest(store, folder, parent, sorted(numbers, reverse=True), note)


def _download_newest(store: Store, folder: Path, parent: str, steps: list[int], note: Note) -> None:
    damaged = 0
    for name in (f"{parent}/step_{step}" for step in steps):
        try:
            if (files := read_manifest(store, name)) is None:
                continue  # the run ended during its upload
            remote = json.loads(store.text(f"{name}/{REMOTE_FILES}") or "{}") if REMOTE_FILES in files else {}
            fetch_folder(store, folder, name, lambda file: file not in remote)  # noqa: B023
            return
        except IncompleteFolder as error:
            note(str(error))
            shutil.rmtree(folder / name, ignore_errors=True)
            damaged += 1
    if damaged:
        raise NotACheckpoint(
            f"none of the {damaged} checkpoints in {store.uri}/{parent} is intact; restore one, or start a new run"
        )


def read_run(run: str, *models: str) -> RunFolder:
    """Open a run, given by path or URI, for reading: its folder, or a local copy of what a store has of it.

    Args:
        models: models whose weights are needed too; logs and metrics are always copied.

    Raises:
        RunFolderError: there is no such run on the store.
    """
    if not is_uri(run):
        return RunFolder(run)
    store = Store(run)
    if store.modified_at("config.yaml") is None:
        raise RunFolderError(f"{store.uri} holds no run; expected a folder that contains a config.yaml")
    # Not the working folder: after an interrupted run it may have newer files than the store.
    folder = RunFolder(copy_folder(store.uri))
    download_logs(store, folder.path)
    for name in set(models) & set(folder_names(store)):
        fetch_copy(f"{store.uri}#{name}")
    return folder


def download_logs(store: Store, folder: Path) -> None:
    """Make a local copy equal to the store's logs, metrics and models without weights; deletes what the store no longer has."""
    names = folder_names(store)
    kept = _download_files(store, folder, names)
    for path in list(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        in_folder = any(f"{name}/".startswith(f"{other}/") for other in (*names, MANIFESTS, *_NOT_READ))
        if path.is_file() and name not in kept and not in_folder:
            path.unlink()
    for name in names:
        if not name.startswith(_NOT_READ) and read_manifest(store, name) is not None:
            fetch_folder(store, folder, name, without_weights)


def fetch_file(uri: str) -> Path:
    """Copy one file to this machine.

    Raises:
        StoreFailed: it does not exist.
    """
    run, _, name = uri.rpartition("/")
    copy = copy_folder(run) / name
    Store(run).get_file(name, copy)
    return copy


def _download_files(store: Store, folder: Path, folders: list[str]) -> set[str]:
    """Download the files outside of `folders` that changed; returns the names of all such files."""
    excluded = tuple(f"{name}/" for name in (*folders, MANIFESTS))
    stats = {name: stat for name, stat in store.stats().items() if name != LOCK and not name.startswith(excluded)}
    for name, stat in stats.items():
        check_inside(store, name)
        path = folder / name
        if not path.is_file() or _size_and_time(path) != stat:
            store.get_file(name, path)
            os.utime(path, (stat[1], stat[1]))
    return set(stats)


def _size_and_time(path: Path) -> tuple[int, float]:
    """Equal to the entry in `Store.stats` if `_download_files` wrote the file and the object has not changed."""
    found = path.stat()
    return found.st_size, found.st_mtime


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:  # this process holds it
            path.unlink()
