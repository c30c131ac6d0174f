"""Where a page may be written, said before anything is read."""

from __future__ import annotations

import os
from pathlib import Path

from rlhf_ray.errors import InputError


class OutputError(InputError, ValueError):
    """A page cannot be written where it should be."""


def output_file(path: Path) -> Path:
    """The path, absolute, of a file that can be written or replaced.

    Raises OutputError where it is a folder, or is in none that exists and may be written in.
    """
    path = path.absolute()
    if path.is_dir():
        raise OutputError(f"{path} is a folder; --output takes a file, such as {path / 'report.html'}")
    if not path.parent.is_dir():
        raise OutputError(
            f"{path} cannot be written: there is no folder {path.parent}. Create it, or give --output a file in one "
            "that exists."
        )
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{path} cannot be written: {path.parent} is read-only for you. Give --output another file.")
    return path
