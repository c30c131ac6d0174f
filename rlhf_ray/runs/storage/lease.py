"""Who may write to a run folder on a store: one run at a time, wherever it is.

Invariants: a lease that is renewed is never taken by another; one that was not renewed for `STALE_S`, by the store's own clock,
is free; whoever lost it finds out at the next renewal and writes no more. Stores have no locks: two that claim a free folder
within the same instant are told apart by reading back who wrote last.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import time
from pathlib import Path

from rlhf_ray.runs.storage.store import Store, StoreFailed
from rlhf_ray.runs.run_folder import RunFolderBusy, atomic_write

LOCK = "run.lock"
STALE_S = 60.0
RENEW_S = 15.0
_PROBE = ".probe"
_TOKEN = ".lease"
"""In a working folder: token of the last lease by which it was written. The lock says of the store's `content` the same."""


class Lease:
    """The right to write, from `take` to `release`."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.store, self.folder = store, folder
        self.token = secrets.token_hex(8)
        self._content: object = None
        self._renewed = 0.0

    @classmethod
    def take(cls, store: Store, folder: Path, settle_s: float = 0.2) -> Lease:
        """Become the holder. The working folder is held by this process already, so a lease that it had is no other's.

        Raises:
            RunFolderBusy: another run holds it.
            StoreFailed: the store cannot be reached or written.
        """
        lease = cls(store, folder)
        store.put_text(_PROBE, "")
        now, written, held = store.written(_PROBE), store.written(LOCK), lease.read()
        store.delete(_PROBE)
        if held is not None and written is not None and not held["ended"] and held["token"] != lease.last:
            age = (now - written).total_seconds()
            if age < STALE_S:
                raise RunFolderBusy(
                    f"{store.uri} is in use by {held['holder']}, which was last heard of {max(age, 0):.0f} s ago. Wait for that "
                    f"run to end or stop it, or choose another name for this one; {STALE_S:.0f} s after its last sign of life "
                    "the folder is free."
                )
        lease._content = None if held is None else held["content"]
        lease._write(ended=False)
        time.sleep(settle_s)
        lease.check()
        return lease

    @property
    def last(self) -> str | None:
        """Token of the last lease by which this working folder was written."""
        path = self.folder / _TOKEN
        return path.read_text() if path.is_file() else None

    @property
    def newest_here(self) -> bool:
        """Whether nobody wrote to the store after this working folder did."""
        return self._content is not None and self._content == self.last

    def keep(self) -> None:
        """The working folder has what the store has: from now on it is the newest."""
        atomic_write(self.folder / _TOKEN, self.token)
        self._content = self.token
        self._write(ended=False)

    def read(self) -> dict[str, object] | None:
        """Who holds the folder, or held it last."""
        text = self.store.text(LOCK)
        return None if text is None else json.loads(text)

    def renew(self) -> None:
        """Say that the run lives, if that is due.

        Raises:
            RunFolderBusy: another run has taken it.
        """
        if time.monotonic() - self._renewed >= RENEW_S:
            self.check()
            self._write(ended=False)

    def check(self) -> None:
        """That nobody else has become the holder.

        Raises:
            RunFolderBusy: somebody has.
        """
        held = self.read()
        if held is not None and held["token"] != self.token:
            raise RunFolderBusy(
                f"{self.store.uri} was taken over by {held['holder']}, while this run could not be heard of for {STALE_S:.0f} s; "
                "this one writes nothing there any more."
            )

    def release(self) -> None:
        """Let others have it at once; where the store does not answer, they have it when it is stale."""
        try:
            self.check()
            self._write(ended=True)
        except (StoreFailed, RunFolderBusy) as error:
            logging.getLogger(__name__).warning("%s was not let go: %s", self.store.uri, error)

    def _write(self, ended: bool) -> None:
        holder = f"pid {os.getpid()} on {socket.gethostname()}"
        record = {"holder": holder, "token": self.token, "content": self._content, "ended": ended}
        self.store.put_text(LOCK, json.dumps(record))
        self._renewed = time.monotonic()
