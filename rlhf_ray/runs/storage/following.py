"""Keeps local copies of the logs of runs on a store up to date while the runs write them.

Invariants: each local file is as the store had it at some moment; a run that is deleted on the store is deleted here; an outage
of the store only delays updates.
"""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_ray.runs.run_folder import RunFolderError
from rlhf_ray.runs.storage.folders import IncompleteFolder
from rlhf_ray.runs.storage.location import NotAStore, watched_folder
from rlhf_ray.runs.storage.session import download_logs
from rlhf_ray.runs.storage.store import Store, StoreFailed

Note = Callable[[str], None]
_NAME = re.compile(r"[\w.-]+")
"""Names of runs that can be part of a URI."""


@contextmanager
def followed(uri: str, note: Note, every_s: float = 5.0) -> Iterator[Path]:
    """Keep a local folder with the logs of a run, or of all runs below a URI, up to date until the block ends.

    Args:
        note: called with each outage and its end, and once with each run that cannot be read.
        every_s: pause between two updates; it grows so that at most a tenth of the time is spent on copying.

    Raises:
        RunFolderError: there is no run.
        StoreFailed: the store does not answer at the start.
    """
    store = Store(uri)
    root, stopping = watched_folder(store.uri), threading.Event()
    if not refresh(store, root, note):
        raise RunFolderError(f"{store.uri} holds no run, and no folders with runs")
    thread = threading.Thread(
        target=_refresh_repeatedly, args=(store, root, every_s, stopping, note), name="following", daemon=True
    )
    thread.start()
    try:
        yield root
    finally:
        stopping.set()
        thread.join()


def refresh(store: Store, root: Path, note: Note = print) -> bool:
    """Update the local copies once; returns whether there is a run. Runs that cannot be read are reported and keep their copy.

    Raises:
        StoreFailed: the store does not answer.
    """
    if store.modified_at("config.yaml") is not None:
        _download(store.uri, root, note)
        return True
    parts = (name.split("/") for name in store.names())  # Google's store has no folders that could be listed
    runs = {part[0] for part in parts if part[1:] == ["config.yaml"] and _NAME.fullmatch(part[0])}
    for name in runs:
        _download(f"{store.uri}/{name}", root / name, note)
    for deleted in set(root.iterdir() if root.is_dir() else ()) - {root / name for name in runs}:
        shutil.rmtree(deleted) if deleted.is_dir() else deleted.unlink()
    return bool(runs)


def _download(uri: str, folder: Path, note: Note) -> None:
    try:
        download_logs(Store(uri), folder)
    except (IncompleteFolder, NotAStore) as error:  # concerns one run only, such as a model during its upload
        note(str(error))


def _refresh_repeatedly(store: Store, root: Path, every_s: float, stopping: threading.Event, note: Note) -> None:
    pause_s, outage_began, noted = every_s, None, set[str]()

    def note_once(message: str) -> None:
        if message not in noted:
            noted.add(message)
            note(message)

    while not stopping.wait(pause_s):
        began = time.monotonic()
        try:
            refresh(store, root, note_once)
        except StoreFailed as error:
            if outage_began is None:
                outage_began = began
                note(f"the store does not answer; the page shows the last known state: {error}")
            continue
        if outage_began is not None:
            note(f"the store answers again after {time.monotonic() - outage_began:.0f} s")
            outage_began = None
        pause_s = max(every_s, 10 * (time.monotonic() - began))
