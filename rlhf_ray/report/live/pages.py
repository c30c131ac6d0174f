"""Pages on request, drawn again only when a file behind them has changed.

Invariants: equal tags mean equal pages; a tag is taken before the files are read, so a change in between gives another tag next
time; what is kept is bounded.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rlhf_ray.report.charts import SERIES_COLOURS
from rlhf_ray.report.comparison import render_comparison
from rlhf_ray.report.live.runs import Runs
from rlhf_ray.report.page import Shell, fill, render
from rlhf_ray.report.reader import RunReader
from rlhf_ray.runs.run_folder import RunFolder

_FOLDER = Path(__file__).parent
_PAGES = 16
_READERS = 32
"""Runs whose records stay in memory: some 16 bytes for each figure of each step."""

SHELL = Shell(
    origin="Live from the files of the run's folder.",
    home="./",
    live_script=(_FOLDER / "live.js").read_text(encoding="utf-8"),
    templates=_FOLDER,
)


@dataclass(frozen=True)
class Page:
    """What is sent."""

    html: str
    status: int = 200

    @cached_property
    def body(self) -> bytes:
        """UTF-8; a lone surrogate, which some model may have sampled, as a question mark."""
        return self.html.encode(errors="replace")


class Pages:
    """All pages of one watched folder. Threads may share it."""

    def __init__(self, root: str | Path) -> None:
        self.runs = Runs(root)
        self._lock = threading.Lock()
        self._pages: OrderedDict[tuple[str, ...], tuple[str, Page]] = OrderedDict()
        self._readers: OrderedDict[str, RunReader] = OrderedDict()

    def overview(self, known: str | None = None) -> tuple[str, Page | None]:
        """Tag and page with all runs; no page where `known` is its tag."""
        with self._lock:
            return self._page(("overview",), self.runs.fingerprint(), self._draw_overview, known)

    def chosen(self, names: Sequence[str], known: str | None = None) -> tuple[str, Page | None]:
        """Tag and page of one run, or of several side by side; no page where `known` is its tag."""
        with self._lock:
            found = {name: self.runs.find(name) for name in names}
            wrong = _wrong(found, self.runs.root)
            if wrong is not None:
                return self._page(("wrong", wrong[1]), wrong, lambda: message(*wrong), known)
            readers = {name: self._reader(folder) for name, folder in found.items() if folder is not None}
            marks = tuple(reader.fingerprint() for reader in readers.values())
            return self._page(("runs", *readers), marks, lambda: _draw(readers), known)

    def _page(
        self, key: tuple[str, ...], marks: object, draw: Callable[[], Page], known: str | None
    ) -> tuple[str, Page | None]:
        tag = hashlib.sha256(repr((key, marks)).encode(errors="replace")).hexdigest()[:32]
        if tag == known:
            return tag, None
        kept = self._pages.pop(key, None)
        if kept is None or kept[0] != tag:
            kept = (tag, draw())
        self._pages[key] = kept
        while len(self._pages) > _PAGES:
            self._pages.popitem(last=False)
        return kept

    def _draw_overview(self) -> Page:
        return Page(fill("overview.html.jinja", SHELL, root=str(self.runs.root), rows=self.runs.rows()))

    def _reader(self, folder: RunFolder) -> RunReader:
        reader = self._readers.pop(folder.name, None) or RunReader(folder)
        self._readers[folder.name] = reader
        while len(self._readers) > _READERS:
            self._readers.popitem(last=False)
        return reader


def message(title: str, text: str, status: int) -> Page:
    """A page that says what is wrong."""
    return Page(fill("message.html.jinja", SHELL, title=title, text=text), status)


def _wrong(found: Mapping[str, RunFolder | None], root: Path) -> tuple[str, str, int] | None:
    """Title, text and status of what is wrong with a choice; None where nothing is."""
    missing = [name for name, folder in found.items() if folder is None]
    if missing:
        return "No such run", f"There is no run {', '.join(map(repr, missing))} in {root}, or no longer.", 404
    if not found:
        return "No run chosen", "Choose one or several in the list of all runs.", 400
    if len(found) > SERIES_COLOURS:
        return "Too many runs", f"{len(found)} are chosen; {SERIES_COLOURS} can be told apart in one chart.", 400
    return None


def _draw(readers: dict[str, RunReader]) -> Page:
    contents = {name: reader.read() for name, reader in readers.items()}
    if len(contents) == 1:
        return Page(render(next(iter(contents.values())), SHELL))
    return Page(render_comparison(contents, SHELL))
