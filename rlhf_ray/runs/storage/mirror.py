"""A working folder, mirrored to a store while a run writes it.

Invariants: a model or checkpoint is put whole, and only when it is whole here; a checkpoint comes after the models that it needs;
what is removed here is removed there only if it was here; an outage of the store costs a run nothing until its next checkpoint.
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
from rlhf_ray.runs.storage.folders import MANIFESTS, delete_folder, folders, put_folder
from rlhf_ray.runs.storage.lease import LOCK, Lease
from rlhf_ray.runs.storage.rank_files import ELSEWHERE
from rlhf_ray.runs.storage.store import Store, StoreFailed
from rlhf_ray.runs.run_folder import RunFolderBusy

PATIENCE_S = 120.0
"""For how long a checkpoint, or the end of a run, waits for a store that does not answer."""
_SKIPPED = (LOCK, "ray_train", MANIFESTS)

Note = Callable[[str], None]
Fingerprint = tuple[tuple[str, int, int], ...]


class Mirror:
    """Puts what changed; in the background at most every `every_s` seconds, and when it is asked to."""

    def __init__(
        self,
        folder: Path,
        store: Store,
        lease: Lease,
        passed_over: Sequence[str] = (),
        every_s: float = 3.0,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """`passed_over`: what was damaged when the folder was brought here, to be noted."""
        self.folder, self.store, self.lease, self.passed_over = folder, store, lease, tuple(passed_over)
        self.every_s, self.patience_s = every_s, patience_s
        self._put: dict[str, Fingerprint] = {}
        self._one_at_a_time, self._ending = threading.Lock(), threading.Event()

    @contextmanager
    def running(self, note: Note) -> Iterator[None]:
        """Mirror in the background, and for the last time at the end, however the block ends.

        Args:
            note: is told of outages, each once, and of their ends; and of damaged checkpoints, at once.

        Raises:
            StoreFailed: the end could not be put; not where the block failed by itself.
        """
        for reason in self.passed_over:
            note(reason)
        thread = threading.Thread(target=self._keep_up, args=(note,), name="mirror", daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            self._end(thread)
            try:
                self.push()
            except (StoreFailed, RunFolderBusy) as error:
                logging.getLogger(__name__).warning("the last state is only in %s: %s", self.folder, error)
            raise
        self._end(thread)
        self.push()

    def push(self) -> None:
        """Put everything that changed, and wait for it.

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
                        f"{error}; after {self.patience_s:.0f} s of trying. All of it is in {self.folder}, and --resume on this "
                        "machine goes on from there"
                    ) from error
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, 10.0)

    def _keep_up(self, note: Note) -> None:
        wait_s, since = self.every_s, None
        while not self._ending.wait(wait_s):
            began = time.monotonic()
            try:
                self._sync()
            except StoreFailed as error:
                if since is None:
                    since = began
                    note(f"the store does not answer; the run goes on without it, and tries again: {error}")
                wait_s = min(2 * wait_s, 60.0)
                continue
            except RunFolderBusy as error:
                return note(str(error))
            if since is not None:
                note(f"the store answers again, after {time.monotonic() - since:.0f} s; it has everything by now")
                since = None
            # Long logs take long to put: at most a tenth of the time goes into it.
            wait_s = max(self.every_s, 10 * (time.monotonic() - began))

    def _end(self, thread: threading.Thread) -> None:
        self._ending.set()
        thread.join()

    def _sync(self) -> None:
        with self._one_at_a_time:
            self.lease.renew()
            # Listed before anything is looked into: whatever a checkpoint of this list needs is complete by then.
            found = self._found()
            for name in sorted(found, key=_order):
                self._put_changed(name)
            for name in self._put.keys() - found:
                if _is_folder(self._put[name]):
                    delete_folder(self.store, name)
                elif name.rpartition("/")[0] not in found:  # where a model is now, its files belong to it
                    self.store.delete(name)
                del self._put[name]

    def _found(self) -> set[str]:
        """Names of whole folders and of single files."""
        found: set[str] = set()
        for path, subfolders, files in os.walk(self.folder):
            place = Path(path)
            name = place.relative_to(self.folder).as_posix()
            if place != self.folder and ("config.json" in files or atomic_checkpoint.MANIFEST in files):
                found.add(name)
                subfolders.clear()
                continue
            subfolders[:] = [s for s in subfolders if not s.startswith((".", "tmp_")) and s not in _SKIPPED]
            found |= {
                file if name == "." else f"{name}/{file}"
                for file in files
                if not file.startswith(".") and file not in _SKIPPED
            }
        return found

    def _put_changed(self, name: str) -> None:
        self.lease.renew()
        path = self.folder / name
        try:
            now = _fingerprint(path)
            if self._put.get(name) == now:
                return
            if _is_folder(now):
                elsewhere = path / ELSEWHERE
                others = json.loads(elsewhere.read_text()) if elsewhere.is_file() else None
                if put_folder(self.store, self.folder, name, others):
                    self._remove_older(name)
            else:
                self.store.put_file(path, name)
        except FileNotFoundError:
            now = ()  # removed or replaced meanwhile; the next round sees to it
        self._put[name] = now

    def _remove_older(self, name: str) -> None:
        """Checkpoints older than all that are here: those that a resumed run did not fetch."""
        place, _, step = name.rpartition("/")
        if not step.startswith("step_") or not place.startswith("checkpoints"):
            return
        oldest = min(int(path.name.removeprefix("step_")) for path in (self.folder / place).glob("step_*"))
        for other in folders(self.store):
            where, _, number = other.rpartition("/")
            if where == place and number.startswith("step_") and int(number.removeprefix("step_")) < oldest:
                delete_folder(self.store, other)


def _order(name: str) -> tuple[bool, str]:
    return "/step_" in name, name


def _fingerprint(path: Path) -> Fingerprint:
    """Equal as long as nothing changes. A single file has one entry, named `.`."""
    paths = sorted(path.rglob("*")) if path.is_dir() else [path]
    stats = ((p.relative_to(path).as_posix(), p.stat()) for p in paths if p.is_file())
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def _is_folder(fingerprint: Fingerprint) -> bool:
    return not fingerprint or fingerprint[0][0] != "."
