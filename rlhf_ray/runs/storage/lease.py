"""A lease on a run folder on a store: only one run at a time may write to it, whichever machine the run is on.

Invariants: another run never takes a lease that is renewed; a lease that was not renewed for `STALE_S`, by the store's own
clock, is free; a run that lost its lease notices at the next renewal and stops writing. Stores have no locks: if two runs claim
a free folder at the same moment, both read the lock back and the last writer wins.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import time
from pathlib import Path

from rlhf_ray.runs.run_folder import RunFolderBusy, atomic_write
from rlhf_ray.runs.storage.store import Store, StoreFailed

LOCK = "run.lock"
STALE_S = 60.0
RENEW_S = 15.0
_PROBE = ".probe"
_TOKEN = ".lease"
"""File in a working folder: token of the last lease under which it was written. The lock's `content` is that of the store."""


class Lease:
    """The right to write, from `take` until `release`."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.store, self.folder = store, folder
        self.token = secrets.token_hex(8)
        self._content: object = None
        self._renewed = 0.0

    @classmethod
    def take(cls, store: Store, folder: Path, settle_s: float = 0.2) -> Lease:
        """Become the holder.

        This process must hold the working folder already. A lease that was last taken from this folder is therefore free.

        Raises:
            RunFolderBusy: another run holds it.
            StoreFailed: the store cannot be reached or written.
        """
        lease = cls(store, folder)
        store.put_text(_PROBE, "")
        now, renewed, held = store.modified_at(_PROBE), store.modified_at(LOCK), lease.read_lock()
        store.delete(_PROBE)
        if held is not None and renewed is not None and not held["ended"] and held["token"] != lease.last_token:
            # Without a time another run has just deleted the probe object, so it is starting too.
            age = 0.0 if now is None else (now - renewed).total_seconds()
            if age < STALE_S:
                raise RunFolderBusy(
                    f"{store.uri} is in use by {held['holder']}, which last renewed its lease {max(age, 0):.0f} s ago. "
                    f"Wait for that run to end or stop it, or choose another name for this one. The folder is free "
                    f"{STALE_S:.0f} s after the last renewal."
                )
        lease._content = None if held is None else held["content"]
        lease._write(ended=False)
        time.sleep(settle_s)
        lease.check()
        return lease

    @property
    def last_token(self) -> str | None:
        """Token of the last lease under which this working folder was written."""
        path = self.folder / _TOKEN
        return path.read_text() if path.is_file() else None

    @property
    def local_is_newest(self) -> bool:
        """Whether this working folder was the last that wrote to the store."""
        return self._content is not None and self._content == self.last_token

    def mark_local_newest(self) -> None:
        """Note that the working folder has everything that the store has, and is the newest from now on."""
        atomic_write(self.folder / _TOKEN, self.token)
        self._content = self.token
        self._write(ended=False)

    def read_lock(self) -> dict[str, object] | None:
        """The lock: who holds the folder, or held it last."""
        text = self.store.text(LOCK)
        return None if text is None else json.loads(text)

    def renew(self) -> None:
        """Renew the lease if it is due.

        Raises:
            RunFolderBusy: another run has taken it.
        """
        if time.monotonic() - self._renewed >= RENEW_S:
            self.check()
            self._write(ended=False)

    def check(self) -> None:
        """Check that this run still holds the lease.

        Raises:
            RunFolderBusy: another run has taken it.
        """
        held = self.read_lock()
        if held is not None and held["token"] != self.token:
            raise RunFolderBusy(
                f"{self.store.uri} was taken over by {held['holder']}, because this run did not renew its lease for "
                f"{STALE_S:.0f} s; this run no longer writes there."
            )

    def release(self) -> None:
        """Free the lease at once. If the store does not answer, it becomes free when it is stale."""
        try:
            self.check()
            self._write(ended=True)
        except (StoreFailed, RunFolderBusy) as error:
            logging.getLogger(__name__).warning("the lease on %s was not released: %s", self.store.uri, error)

    def _write(self, ended: bool) -> None:
        holder = f"pid {os.getpid()} on {socket.gethostname()}"
        record = {"holder": holder, "token": self.token, "content": self._content, "ended": ended}
        self.store.put_text(LOCK, json.dumps(record))
        self._renewed = time.monotonic()
