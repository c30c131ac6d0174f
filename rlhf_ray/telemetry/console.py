"""The one console that everything a person reads goes through, so that progress displays and messages never
interleave."""

from __future__ import annotations

from rich.console import Console

console = Console()
