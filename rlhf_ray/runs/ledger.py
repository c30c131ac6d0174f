"""ledger.jsonl: which rollouts were trained, and which were dropped and why, one line per optimizer step.

Invariant: after any crash and resume, every rollout id is in at most one line. A resumed run first removes the lines of steps
that came after its checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rlhf_ray.runs.jsonl import read_jsonl
from rlhf_ray.runs.run_folder import atomic_write


@dataclass(frozen=True)
class LedgerEntry:
    """One optimizer step."""

    step: int
    trained: tuple[str, ...]
    """Rollout ids."""
    dropped: tuple[tuple[str, str], ...] = ()
    """(prompt id, reason) of the groups that were dropped since the previous step."""


class Ledger:
    """Writes the ledger of a run. Only the driver has one."""

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        """Open the ledger and keep its entries up to `resume_step`; None keeps none."""
        self.path = path
        kept = [entry for entry in read_ledger(path) if resume_step is not None and entry.step <= resume_step]
        atomic_write(path, "".join(_line(entry) for entry in kept))
        self._dropped: list[tuple[str, str]] = []

    def drop(self, prompt_id: str, reason: str) -> None:
        """Note a group that was dropped; it is written with the next step."""
        self._dropped.append((prompt_id, reason))

    def train(self, step: int, rollout_ids: Sequence[str]) -> LedgerEntry:
        """Write the entry of a step that was applied."""
        # Sorted, because groups are dropped in the order in which they happen to be complete.
        entry = LedgerEntry(step, tuple(rollout_ids), tuple(sorted(self._dropped)))
        self._dropped.clear()
        with self.path.open("a") as file:
            file.write(_line(entry))
            file.flush()
            # A checkpoint must never contain a step that the ledger lost.
            os.fsync(file.fileno())
        return entry


def read_ledger(path: Path) -> Iterator[LedgerEntry]:
    """Yield the entries in order; a last line that a crash tore is skipped."""
    for fields in read_jsonl(path):
        yield LedgerEntry(fields["step"], tuple(fields["trained"]), tuple((p, r) for p, r in fields["dropped"]))


def _line(entry: LedgerEntry) -> str:
    return json.dumps(asdict(entry)) + "\n"
