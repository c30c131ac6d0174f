"""Mirrors a run's working folder to a store while the run writes to it.

Invariants: a model or checkpoint is uploaded as a whole, and only when it is complete here; a checkpoint is uploaded after the
models that it needs; only what was here before is deleted from the store; an outage of the store does not disturb a run until
its next checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rlhf_ray.runs import atomic_checkpoint
from rlhf_ray.runs.run_folder import RunFolderBusy
from rlhf_ray.runs.storage.folders import MANIFESTS, delete_folder, folder_names, upload_folder
from rlhf_ray.runs.storage.lease import LOCK, Lease
from rlhf_ray.runs.storage.rank_files import REMOTE_FILES
from rlhf_ray.runs.storage.store import Store, StoreFailed

PATIENCE_S = 120.0
"""How long a checkpoint, or the end of a run, waits for a store that does not answer."""
_NOT_UPLOADED = (LOCK, "ray_train", MANIFESTS)

Note = Callable[[str], None]
Fingerprint = tuple[tuple[str, int, int], ...]


class Mirror:
    """Uploads what changed: in the background at most every `every_s` seconds, and whenever `push` is called."""

    def __init__(
        self,
        folder: Path,
        store: Store,
        lease: Lease,
        warnings: Sequence[str] = (),
        every_s: float = 3.0,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """`warnings`: problems found when the folder was downloaded, which `running` reports."""
        self.folder, self.store, self.lease, self.warnings = folder, store, lease, tuple(warnings)
        self.every_s, self.patience_s = every_s, patience_s
        self._uploaded: dict[str, Fingerprint] = {}
        self._sync_lock, self._stopping = threading.Lock(), threading.Event()

    @contextmanager
    def running(self, note: Note) -> Iterator[None]:
        """Mirror in the background during the block, and once more at its end, however it ends.

        Args:
            note: called with each outage and its end, and with the warnings of the download.

        Raises:
            StoreFailed: the final state could not be uploaded; not raised if the block itself failed.
        """
        for warning in self.warnings:
            note(warning)
        thread = threading.Thread(target=self._run_in_background, args=(note,), name="mirror", daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            self._stop(thread)
            try:
                self.push()
            except (StoreFailed, RunFolderBusy) as error:
                logging.getLogger(__name__).warning("the final state is only in %s: %s", self.folder, error)
            raise
        self._stop(thread)
        self.push()

    def push(self) -> None:
        """Upload everything that changed, and wait until it is done.

        Raises:
            StoreFailed: the store did not answer for `patience_s`.
            RunFolderBusy: another run has taken the folder over.
        """
        deadline, wait_s = time.monotonic() + self.patience_s, 0.5
        while True:
            try:
                return self._sync()
            except StoreFailed as error:
                if time.monotonic() + wait_s > deadline:
                    raise StoreFailed(
                        f"{error}; gave up after {self.patience_s:.0f} s. Everything is in {self.folder}, and --resume on this "
                        "machine continues from there"
                    ) from error
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, 10.0)

    def _run_in_background(self, note: Note) -> None:
        wait_s, since = self.every_s, None
        while not self._stopping.wait(wait_s):
            began = time.monotonic()
            try:
                self._sync()
            except StoreFailed as error:
                if since is None:
                    since = began
                    note(f"the store does not answer; the run continues and retries: {error}")
                wait_s = min(2 * wait_s, 60.0)
                continue
            except RunFolderBusy as error:
                return note(str(error))
            if since is not None:
                note(f"the store answers again after {time.monotonic() - since:.0f} s; everything is uploaded")
                since = None
            # Long logs take long to upload: at most a tenth of the time is spent on it.
            wait_s = max(self.every_s, 10 * (time.monotonic() - began))

    def _stop(self, thread: threading.Thread) -> None:
        self._stopping.set()
        thread.join()

    def _sync(self) -> None:
        with self._sync_lock:
            self.lease.renew()
            # List everything first: the models that a listed checkpoint needs are complete by now.
            found = self._local_names()
            for name in sorted(found, key=_checkpoints_last):
                self._upload_if_changed(name)
            for name in self._uploaded.keys() - found:
                if _is_folder(self._uploaded[name]):
                    delete_folder(self.store, name)
                elif name.rpartition("/")[0] not in found:  # a model's files are uploaded with its folder
                    self.store.delete(name)
                del self._uploaded[name]

    def _local_names(self) -> set[str]:
        """Names of complete folders and of single files."""
        found: set[str] = set()
        for path, subfolders, files in os.walk(self.folder):
            place = Path(path)
            name = place.relative_to(self.folder).as_posix()
            if place != self.folder and ("config.json" in files or atomic_checkpoint.MANIFEST in files):
                found.add(name)
                subfolders.clear()
                continue
            subfolders[:] = [s for s in subfolders if not s.startswith((".", "tmp_")) and s not in _NOT_UPLOADED]
            found |= {
                file if name == "." else f"{name}/{file}"
                for file in files
                if not file.startswith(".") and file not in _NOT_UPLOADED
            }
        return found

    def _upload_if_changed(self, name: str) -> None:
        self.lease.renew()
        path = self.folder / name
        try:
            now = _fingerprint(path)
            if self._uploaded.get(name) == now:
                return
            if _is_folder(now):
                listed = path / REMOTE_FILES
                remote = json.loads(listed.read_text()) if listed.is_file() else None
                if upload_folder(self.store, self.folder, name, remote):
                    self._delete_older(name)
            else:
                self.store.put_file(path, name)
        except FileNotFoundError:
            now = ()  # removed or replaced meanwhile; the next round handles it
        self._uploaded[name] = now

    def _delete_older(self, name: str) -> None:
        """Delete checkpoints from the store that are older than all local ones: those that a resumed run did not download."""
        place, _, step = name.rpartition("/")
        if not step.startswith("step_") or not place.startswith("checkpoints"):
            return
        oldest = min(int(path.name.removeprefix("step_")) for path in (self.folder / place).glob("step_*"))
        for other in folder_names(self.store):
            where, _, number = other.rpartition("/")
            if where == place and number.startswith("step_") and int(number.removeprefix("step_")) < oldest:
                delete_folder(self.store, other)


def _checkpoints_last(name: str) -> tuple[bool, str]:
    return "/step_" in name, name


def _fingerprint(path: Path) -> Fingerprint:
    """Name, size and modification time of each file below a path. A single file has one entry, named `.`."""
    paths = sorted(path.rglob("*")) if path.is_dir() else [path]
    stats = ((p.relative_to(path).as_posix(), p.stat()) for p in paths if p.is_file())
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def _is_folder(fingerprint: Fingerprint) -> bool:
    return not fingerprint or fingerprint[0][0] != "."
