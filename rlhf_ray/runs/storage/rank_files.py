"""Checkpoints that several nodes write, without a file system that all of them see.

Invariants: a rank writes to its own node's working folder; what does not lie on the driver's node is put into the store by the
node that has it, before the driver declares the checkpoint whole; of a checkpoint a node fetches what its ranks read.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
from pathlib import Path

from rlhf_ray.runs.storage.folders import Manifest, begin, digests, fetch_folder, put_files
from rlhf_ray.runs.storage.location import is_reference, local, portable, working_folder, working_root
from rlhf_ray.runs.storage.store import Store

ELSEWHERE = ".elsewhere.json"
"""In a checkpoint: name and SHA-256 of its files that were written on other nodes, and by them into the store."""
_OF_RANK = re.compile(r"zero_pp_rank_(\d+)_")
"""In the name of a file that DeepSpeed reads on one rank alone."""


def whereabouts() -> str:
    """Equal for processes that see the same working folders."""
    return f"{socket.gethostname()}:{working_root()}"


def put_share(reference: str) -> Manifest:
    """Put what this node wrote below a reference into the store, and remove it here; its files, named from there."""
    uri, _, name = reference.partition("#")
    store, run, kept = Store(uri), working_folder(uri), sealed_name(name)
    begin(store, "/".join(Path(kept).parts[:2]))
    if kept != name:
        shutil.rmtree(run / kept, ignore_errors=True)
        (run / kept).parent.mkdir(parents=True, exist_ok=True)
        (run / name).rename(run / kept)
    files = put_files(store, run, kept)
    shutil.rmtree(run / kept)
    return files


def collect(folder: Path, files: Manifest) -> None:
    """Fetch what another node put, to the same folder of this node."""
    uri, _, name = portable(folder).partition("#")
    store = Store(uri)
    for file in files:
        store.get_file(f"{sealed_name(name)}/{file}", folder / file)
    if digests(folder) != files:
        raise OSError(f"{store.uri}/{name}: what came from another node differs from what it wrote")


def note_elsewhere(folder: Path, files: Manifest) -> None:
    """Write down, in the checkpoint that `folder` is a part of, which files of it are on other nodes."""
    path = folder.parent / ELSEWHERE
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(known | {f"{folder.name}/{file}": digest for file, digest in files.items()}, indent=1))


def take_share(reference: str, rank: int) -> Path:
    """The part of a checkpoint that a rank reads, on this node.

    Raises:
        NotWhole, StoreFailed: it cannot be had, or is damaged.
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


def sealed_name(name: str) -> str:
    """Of a folder that is still being written, as it will be called."""
    return "/".join(part.removeprefix("tmp_") for part in name.split("/"))
