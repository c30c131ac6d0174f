"""A run whose folder is on a store: held, brought to this machine, mirrored, let go.

Invariant: a run goes on from what the store has, unless this machine was the last that wrote there; then it goes on from what is
here, which is never older.
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
from rlhf_ray.runs.storage.folders import MANIFESTS, NotWhole, check_inside, copy_here, fetch_folder, folders, manifest
from rlhf_ray.runs.storage.lease import LOCK, Lease
from rlhf_ray.runs.storage.location import copy_folder, is_uri, working_folder
from rlhf_ray.runs.storage.mirror import Mirror
from rlhf_ray.runs.storage.rank_files import ELSEWHERE
from rlhf_ray.runs.storage.store import Store
from rlhf_ray.runs.run_folder import RunFolder, RunFolderError, RunFolderTaken

Note = Callable[[str], None]
_UNREAD = ("checkpoints", "published")
"""Folders of models that nobody reads who reads a run."""


def run_folder(config: RunConfig) -> RunFolder:
    """Where a run works on this node."""
    run = f"{config.folder.rstrip('/')}/{config.name}"
    return RunFolder(working_folder(run) if is_uri(run) else run)


@contextmanager
def hold(config: RunConfig, resume: bool) -> Iterator[tuple[RunFolder, Mirror | None]]:
    """Hold a run's folder until the block ends, as `RunFolder.claim`; of one on a store also its mirror, not started yet.

    Raises:
        RunFolderBusy: a run is in it, here or elsewhere.
        RunFolderTaken: a fresh run would start over an old one.
        StoreFailed: the store cannot be reached or written.
        NotWhole, NotACheckpoint: a model there is damaged, or all checkpoints are.
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
            passed_over = _bring(store, folder.path, lease, resume)
            yield folder, Mirror(folder.path, store, lease, passed_over)
        finally:
            lease.release()


def read_run(run: str, *models: str) -> RunFolder:
    """For commands that read a run, named by path or URI: its folder, or a copy of what a store has of it.

    Args:
        models: those whose weights are wanted, too; logs and figures always come.

    Raises:
        RunFolderError: the store has no such run.
    """
    if not is_uri(run):
        return RunFolder(run)
    store = Store(run)
    if store.written("config.yaml") is None:
        raise RunFolderError(f"{store.uri} holds no run; expected a folder with a config.yaml in it")
    # Not the working folder: a run that was interrupted here may have newer files in it than the store.
    folder = RunFolder(copy_folder(store.uri))
    pull_logs(store, folder.path)
    for name in set(models) & set(folders(store)):
        copy_here(f"{store.uri}#{name}")
    return folder


def pull_logs(store: Store, folder: Path) -> None:
    """Make a copy what the store has of a run's logs and figures, and of its models all but the weights; what is gone goes."""
    marked = folders(store)
    kept = _pull_files(store, folder, marked)
    for path in list(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        inside = any(f"{name}/".startswith(f"{m}/") for m in (*marked, MANIFESTS, *_UNREAD))
        if path.is_file() and name not in kept and not inside:
            path.unlink()
    for name in marked:
        if not name.startswith(_UNREAD) and manifest(store, name) is not None:
            fetch_folder(store, folder, name, lambda file: not file.endswith(".safetensors"))


def read_file(uri: str) -> Path:
    """A copy of one file.

    Raises:
        StoreFailed: there is none.
    """
    run, _, name = uri.rpartition("/")
    copy = copy_folder(run) / name
    Store(run).get_file(name, copy)
    return copy


def _bring(store: Store, folder: Path, lease: Lease, resume: bool) -> tuple[str, ...]:
    """Make the working folder what the run starts from; which damaged checkpoints were passed over."""
    there = store.written("config.yaml") is not None
    if there and not resume:
        raise RunFolderTaken(
            f"{store.uri} already holds a run. Continue it with --resume, or choose another name for this one; to begin again "
            "under the same name, delete or move what is there first."
        )
    passed_over: list[str] = []
    if not (resume and lease.newest_here):
        _empty(folder)
        if there:
            pull(store, folder, passed_over.append)
    lease.keep()
    return tuple(passed_over)


def pull(store: Store, folder: Path, note: Note) -> None:
    """Bring logs, models, and of each kind of checkpoints the newest whole one to an empty working folder.

    Raises:
        NotWhole: a model is damaged.
        NotACheckpoint: all checkpoints of a kind are.
    """
    marked = folders(store)
    # Simulated data are there whole or not at all, which files that came one by one are not; their seed gives the same again.
    _pull_files(store, folder, [*marked, "data"])
    steps: dict[str, list[int]] = {}
    for name in marked:
        place, _, last = name.rpartition("/")
        if place.startswith("checkpoints") and last.startswith("step_"):
            steps.setdefault(place, []).append(int(last.removeprefix("step_")))
        elif manifest(store, name) is not None:
            fetch_folder(store, folder, name)
    for place, numbers in steps.items():
        _pull_newest(store, folder, place, sorted(numbers, reverse=True), note)


def _pull_newest(store: Store, folder: Path, place: str, steps: list[int], note: Note) -> None:
    damaged = 0
    for name in (f"{place}/step_{step}" for step in steps):
        try:
            if (files := manifest(store, name)) is None:
                continue  # the run ended while it came
            elsewhere = json.loads(store.text(f"{name}/{ELSEWHERE}") or "{}") if ELSEWHERE in files else {}
            fetch_folder(store, folder, name, lambda file: file not in elsewhere)  # noqa: B023
            return
        except NotWhole as error:
            note(str(error))
            shutil.rmtree(folder / name, ignore_errors=True)
            damaged += 1
    if damaged:
        raise NotACheckpoint(
            f"none of the {damaged} checkpoints in {store.uri}/{place} is whole; restore one, or start a new run"
        )


def _pull_files(store: Store, folder: Path, marked: list[str]) -> set[str]:
    """Bring what changed outside of the marked folders; names of all that is there."""
    inside = tuple(f"{name}/" for name in (*marked, MANIFESTS))
    marks = {name: m for name, m in store.marks().items() if name != LOCK and not name.startswith(inside)}
    for name, mark in marks.items():
        check_inside(store, name)
        path = folder / name
        if not path.is_file() or _mark(path) != mark:
            store.get_file(name, path)
            os.utime(path, (mark[1], mark[1]))
    return set(marks)


def _mark(path: Path) -> tuple[int, float]:
    """Of a file that `_pull_files` brought: that of the object."""
    found = path.stat()
    return found.st_size, found.st_mtime


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:  # this process holds it
            path.unlink()
