"""Checkpoints that several nodes write without a shared file system.

Invariants: a rank writes to the working folder of its own node; files that are not on the driver's node are uploaded by the
node that has them before the driver marks the checkpoint as complete; a node downloads only those files of a checkpoint that
its ranks read.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
from pathlib import Path

from rlhf_ray.runs.storage.folders import Manifest, fetch_folder, file_digests, mark_incomplete, upload_files
from rlhf_ray.runs.storage.location import is_reference, local, portable, working_folder, working_root
from rlhf_ray.runs.storage.store import Store

REMOTE_FILES = ".elsewhere.json"
"""File in a checkpoint: names and SHA-256 of its files that other nodes wrote and uploaded."""
_OF_RANK = re.compile(r"zero_pp_rank_(\d+)_")
"""Marks a DeepSpeed file that only one rank reads."""


def working_root_id() -> str:
    """Equal for processes that see the same working folders."""
    return f"{socket.gethostname()}:{working_root()}"


def upload_rank_files(reference: str) -> Manifest:
    """Upload what this node wrote below a reference, and delete it here. Names in the manifest are relative to the reference."""
    uri, _, name = reference.partition("#")
    store, run, final = Store(uri), working_folder(uri), _final_name(name)
    mark_incomplete(store, "/".join(Path(final).parts[:2]))
    if final != name:
        shutil.rmtree(run / final, ignore_errors=True)
        (run / final).parent.mkdir(parents=True, exist_ok=True)
        (run / name).rename(run / final)
    files = upload_files(store, run, final)
    shutil.rmtree(run / final)
    return files


def fetch_uploaded_files(folder: Path, files: Manifest) -> None:
    """Download files that another node uploaded from the same folder into the folder of this node."""
    uri, _, name = portable(folder).partition("#")
    store = Store(uri)
    for file in files:
        store.get_file(f"{_final_name(name)}/{file}", folder / file)
    if file_digests(folder) != files:
        raise OSError(f"{store.uri}/{name}: the files downloaded differ from those that the other node wrote")


def record_remote_files(folder: Path, files: Manifest) -> None:
    """Record in the checkpoint to which `folder` belongs which of the folder's files other nodes uploaded."""
    path = folder.parent / REMOTE_FILES
    recorded = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(
        json.dumps(recorded | {f"{folder.name}/{file}": digest for file, digest in files.items()}, indent=1)
    )


def fetch_rank_files(reference: str, rank: int) -> Path:
    """Download the files of a checkpoint that a rank reads; returns the local folder.

    Raises:
        IncompleteFolder, StoreFailed: they are damaged or cannot be downloaded.
    """
    if not is_reference(reference):
        return Path(reference)
    uri, _, name = reference.partition("#")
    checkpoint, _, part = name.rpartition("/")

    def needed(file: str) -> bool:
        of_rank = _OF_RANK.search(file)
        return file.startswith(f"{part}/") and (of_rank is None or int(of_rank[1]) == rank)

    fetch_folder(Store(uri), working_folder(uri), checkpoint, needed)
    return local(reference)


def _final_name(name: str) -> str:
    """The name that a folder will have when its checkpoint is complete."""
    return "/".join(part.removeprefix("tmp_") for part in name.split("/"))
