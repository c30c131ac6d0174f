"""Checkpoints of a run: written whole or not at all, checked byte by byte before they are used.

Protocol: `tmp_step_N` → every role writes → SHA-256 manifest → fsync → rename to `step_N` → fsync of the parent. A folder
without a complete, matching manifest is not a checkpoint. DeepSpeed's files are pickles: load only checkpoints you trust.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.errors import InputError

MANIFEST = "manifest.json"
STATE = "state.json"


class NotACheckpoint(InputError, ValueError):
    """A folder is no complete, unchanged checkpoint."""


@dataclass(frozen=True)
class RunState:
    """What the driver must remember beside the learners' own state."""

    step: int
    """PPO steps done; also the policy version."""
    next_group: int
    """Cursor into the prompt source; groups are a function of it (epoch, order, seeds)."""
    kl: dict[str, Any]
    """State of the KL controller."""
    config_sha256: str
    """Fingerprint of the resolved config."""
    unfinished: Sequence[int] = ()
    """Groups before the cursor that were neither trained nor given up."""


async def save(folder: Path, state: RunState, write_roles: Callable[[Path], Awaitable[None]], keep: int) -> Path:
    """Write `folder/step_N` by the protocol; remove all but the newest `keep`.

    Args:
        write_roles: writes the learners' files below the path it is given.
    """
    final = folder / f"step_{state.step}"
    temporary = folder / f"tmp_step_{state.step}"
    for leftover in folder.glob("tmp_step_*"):
        shutil.rmtree(leftover)
    temporary.mkdir(parents=True)
    await write_roles(temporary)
    (temporary / STATE).write_text(json.dumps(asdict(state)))
    # Reading and hashing gigabytes must not stop the event loop, in which rollouts arrive.
    await asyncio.to_thread(_seal, temporary, final)
    # A newer folder that a resumed run passed over as damaged must not count among those that are kept.
    for old in [step for step in _steps(folder) if step <= state.step][:-keep]:
        shutil.rmtree(folder / f"step_{old}")
    return final


def _seal(temporary: Path, final: Path) -> None:
    """Manifest, fsync, rename."""
    manifest = {str(p.relative_to(temporary)): _sha256(p) for p in sorted(temporary.rglob("*")) if p.is_file()}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in (temporary, *temporary.rglob("*")):
        _fsync(path)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    _fsync(final.parent)


def load_state(checkpoint: Path) -> RunState:
    """Check a checkpoint against its manifest and read the driver's state.

    Raises:
        NotACheckpoint: naming the folder and what is missing or differs.
    """
    manifest_path = checkpoint / MANIFEST
    if not manifest_path.is_file():
        raise NotACheckpoint(f"{checkpoint} is not a checkpoint: it has no {MANIFEST}")
    try:
        manifest: dict[str, str] = json.loads(manifest_path.read_text())
        if STATE not in manifest:
            raise NotACheckpoint(f"checkpoint {checkpoint} is damaged: its {MANIFEST} does not list {STATE}")
        for name, digest in manifest.items():
            path = checkpoint / name
            if not path.is_file():
                raise NotACheckpoint(f"checkpoint {checkpoint} is incomplete: {name} is missing")
            if _sha256(path) != digest:
                raise NotACheckpoint(f"checkpoint {checkpoint} is damaged: {name} does not match its SHA-256")
        fields = json.loads((checkpoint / STATE).read_text())
        return RunState(**fields | {"unfinished": tuple(fields.get("unfinished", ()))})
    except NotACheckpoint:
        raise
    except (ValueError, TypeError, AttributeError, OSError) as error:
        # A manifest with flipped bits is no UTF-8, no JSON, or JSON of another shape.
        raise NotACheckpoint(f"checkpoint {checkpoint} is damaged: {error}") from error


def newest(folder: Path, on_damaged: Callable[[str], None]) -> tuple[Path, RunState] | None:
    """The newest checkpoint that passes its check; None where there is none at all.

    Args:
        on_damaged: told about each newer one that was passed over.

    Raises:
        NotACheckpoint: there are checkpoints and none of them is whole; starting afresh would hide the loss.
    """
    steps = _steps(folder)
    for step in reversed(steps):
        try:
            return folder / f"step_{step}", load_state(folder / f"step_{step}")
        except NotACheckpoint as error:
            on_damaged(str(error))
    if steps:
        raise NotACheckpoint(
            f"none of the {len(steps)} checkpoints in {folder} is whole; restore one, or start a new run"
        )
    return None


def fingerprint(config_text: str) -> str:
    """SHA-256 of a resolved config."""
    return hashlib.sha256(config_text.encode()).hexdigest()


def _steps(folder: Path) -> list[int]:
    names = (path.name.removeprefix("step_") for path in folder.glob("step_*"))
    return sorted(int(name) for name in names if name.isdigit())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
