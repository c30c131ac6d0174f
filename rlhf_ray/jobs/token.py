"""The token of a Ray cluster."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def read_token(environment: Mapping[str, str]) -> str | None:
    """The token from where Ray looks for it, in Ray's order; None where there is none."""
    if token := environment.get("RAY_AUTH_TOKEN", "").strip():
        return token
    path = Path(environment.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    return path.read_text().strip() if path.is_file() else None
