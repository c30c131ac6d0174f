"""Logs of runs on a store, on this machine, while the runs write them.

Invariants: what is here is as the store had it at some moment, file by file; a run that is gone there goes here; an outage costs
nothing but time.
"""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_ray.runs.storage.folders import NotWhole
from rlhf_ray.runs.storage.location import NotAStore, watched_folder
from rlhf_ray.runs.storage.session import pull_logs
from rlhf_ray.runs.storage.store import Store, StoreFailed
from rlhf_ray.runs.run_folder import RunFolderError

Note = Callable[[str], None]
_NAME = re.compile(r"[\w.-]+")
"""What a URI can have as the name of a run."""


@contextmanager
def followed(uri: str, note: Note, every_s: float = 5.0) -> Iterator[Path]:
    """The folder in which a run, or all runs below a URI, are kept up until the block ends.

    Args:
        note: is told of outages, each once, and of their ends.
        every_s: longest rest between two looks; at most a tenth of the time goes into copying.

    Raises:
        RunFolderError: there is no run.
        StoreFailed: the store does not answer at the beginning.
    """
    store = Store(uri)
    root, ending = watched_folder(store.uri), threading.Event()
    if not refresh(store, root, note):
        raise RunFolderError(f"{store.uri} holds no run, and no folders with runs")
    thread = threading.Thread(target=_keep_up, args=(store, root, every_s, ending, note), name="following", daemon=True)
    thread.start()
    try:
        yield root
    finally:
        ending.set()
        thread.join()


def refresh(store: Store, root: Path, note: Note = print) -> bool:
    """Make the copies what the store has now; whether it has a run. A run that cannot be read is noted, and left as it was known.

    Raises:
        StoreFailed: the store does not answer.
    """
    if store.written("config.yaml") is not None:
        _pull(store.uri, root, note)
        return True
    places = (name.split("/") for name in store.names())  # Google's store knows no folders that could be asked for
    runs = {place[0] for place in places if place[1:] == ["config.yaml"] and _NAME.fullmatch(place[0])}
    for name in runs:
        _pull(f"{store.uri}/{name}", root / name, note)
    for gone in set(root.iterdir() if root.is_dir() else ()) - {root / name for name in runs}:
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    return bool(runs)


def _pull(uri: str, folder: Path, note: Note) -> None:
    try:
        pull_logs(Store(uri), folder)
    except (NotWhole, NotAStore) as error:  # of one run, such as a model that is just being written
        note(str(error))


def _keep_up(store: Store, root: Path, every_s: float, ending: threading.Event, note: Note) -> None:
    rest_s, since, said = every_s, None, set[str]()

    def once(message: str) -> None:
        if message not in said:
            said.add(message)
            note(message)

    while not ending.wait(rest_s):
        began = time.monotonic()
        try:
            refresh(store, root, once)
        except StoreFailed as error:
            if since is None:
                since = began
                note(f"the store does not answer; the page shows what was known: {error}")
            continue
        if since is not None:
            note(f"the store answers again, after {time.monotonic() - since:.0f} s")
            since = None
        rest_s = max(every_s, 10 * (time.monotonic() - began))
