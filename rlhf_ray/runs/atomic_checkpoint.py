"""Numbered checkpoint folders that are written completely or not at all, and are checked byte by byte before they are used.

Protocol: write into `tmp_step_N`, add a manifest of SHA-256 digests, fsync, rename to `step_N`, fsync the parent. A folder
without a complete and matching manifest is not a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from rlhf_ray.errors import InputError

MANIFEST = "manifest.json"
Content = TypeVar("Content")


class NotACheckpoint(InputError, ValueError):
    """A folder is not a complete, unchanged checkpoint."""


def begin(folder: Path, step: int) -> Path:
    """Create an empty temporary folder to write into, and remove what interrupted attempts left behind."""
    for leftover in folder.glob("tmp_step_*"):
        shutil.rmtree(leftover)
    temporary = folder / f"tmp_step_{step}"
    temporary.mkdir(parents=True)
    return temporary


def seal(temporary: Path) -> Path:
    """Write the manifest, fsync, and rename; returns the final path."""
    final = temporary.with_name(temporary.name.removeprefix("tmp_"))
    manifest = {str(p.relative_to(temporary)): file_sha256(p) for p in sorted(temporary.rglob("*")) if p.is_file()}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in (temporary, *temporary.rglob("*")):
        _fsync(path)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    _fsync(final.parent)
    return final


def keep_newest(folder: Path, count: int, up_to: int) -> None:
    """Remove all checkpoints up to step `up_to` except the newest `count`.

    Newer ones, which a resumed run skipped because they are damaged, must not count among those that are kept.
    """
    for old in [step for step in _steps(folder) if step <= up_to][:-count]:
        shutil.rmtree(folder / f"step_{old}")


def verify(checkpoint: Path, needed: str) -> None:
    """Compare a checkpoint with its manifest, which must list the file `needed`.

    Raises:
        NotACheckpoint: names the folder and what is missing or different.
    """
    if not (checkpoint / MANIFEST).is_file():
        raise NotACheckpoint(f"{checkpoint} is not a checkpoint: it has no {MANIFEST}")
    try:
        manifest: dict[str, str] = json.loads((checkpoint / MANIFEST).read_text())
        if needed not in manifest:
            raise NotACheckpoint(f"checkpoint {checkpoint} is damaged: its {MANIFEST} does not list {needed}")
        for name, digest in manifest.items():
            path = checkpoint / name
            if not path.is_file():
                raise NotACheckpoint(f"checkpoint {checkpoint} is incomplete: {name} is missing")
            if file_sha256(path) != digest:
                raise NotACheckpoint(f"checkpoint {checkpoint} is damaged: {name} does not match its SHA-256")
    except NotACheckpoint:
        raise
    except (ValueError, TypeError, AttributeError, OSError) as error:
        # A manifest with flipped bits may be invalid UTF-8, invalid JSON, or JSON of another shape.
        raise NotACheckpoint(f"checkpoint {checkpoint} is damaged: {error}") from error


def newest(
    folder: Path, read: Callable[[Path], Content], on_damaged: Callable[[str], None]
) -> tuple[Path, Content] | None:
    """Find the newest checkpoint that can be read; returns its path and content, or None if the folder has no checkpoints.

    Args:
        read: verifies and reads a checkpoint, or raises NotACheckpoint.
        on_damaged: called with a message for each newer checkpoint that is skipped.

    Raises:
        NotACheckpoint: there are checkpoints and all of them are damaged; starting from scratch would hide the loss.
    """
    steps = _steps(folder)
    for step in reversed(steps):
        try:
            return folder / f"step_{step}", read(folder / f"step_{step}")
        except NotACheckpoint as error:
            on_damaged(str(error))
    if steps:
        raise NotACheckpoint(
            f"none of the {len(steps)} checkpoints in {folder} is intact; restore one, or start a new run"
        )
    return None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _steps(folder: Path) -> list[int]:
    names = (path.name.removeprefix("step_") for path in folder.glob("step_*"))
    return sorted(int(name) for name in names if name.isdigit())


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
