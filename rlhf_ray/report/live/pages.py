"""Pages on request, drawn again only when a file behind them has changed.

Invariants: equal tags mean equal pages; a tag is computed before the files are read, so that a change in between leads to
another tag next time; the number of cached pages and runs is bounded.
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
from rlhf_ray.report.page import Layout, render_report, render_template
from rlhf_ray.report.reader import RunReader
from rlhf_ray.runs.run_folder import RunFolder

_FOLDER = Path(__file__).parent
_MAX_PAGES = 16
_MAX_READERS = 32
"""Number of runs whose records stay in memory, at about 16 bytes per value."""

LAYOUT = Layout(
    origin="Live from the files in the run's folder.",
    home="./",
    live_script=(_FOLDER / "live.js").read_text(encoding="utf-8"),
    templates=_FOLDER,
)


@dataclass(frozen=True)
class Page:
    """A page and its HTTP status."""

    html: str
    status: int = 200

    @cached_property
    def body(self) -> bytes:
        """UTF-8; a lone surrogate, which a model may have sampled, becomes a question mark."""
        return self.html.encode(errors="replace")


class Pages:
    """All pages of one watched folder. It is thread-safe."""

    def __init__(self, root: str | Path) -> None:
        self.runs = Runs(root)
        self._lock = threading.Lock()
        self._pages: OrderedDict[tuple[str, ...], tuple[str, Page]] = OrderedDict()
        self._readers: OrderedDict[str, RunReader] = OrderedDict()

    def overview(self, known_tag: str | None = None) -> tuple[str, Page | None]:
        """Tag and page with all runs; the page is None if `known_tag` is its tag."""
        with self._lock:
            return self._page(("overview",), self.runs.fingerprint(), self._draw_overview, known_tag)

    def chosen(self, names: Sequence[str], known_tag: str | None = None) -> tuple[str, Page | None]:
        """Tag and page of one run, or of several side by side; the page is None if `known_tag` is its tag."""
        with self._lock:
            found = {name: self.runs.find(name) for name in names}
            problem = _problem(found, self.runs.root)
            if problem is not None:
                return self._page(("problem", problem[1]), problem, lambda: message_page(*problem), known_tag)
            readers = {name: self._reader(folder) for name, folder in found.items() if folder is not None}
            fingerprints = tuple(reader.fingerprint() for reader in readers.values())
            return self._page(("runs", *readers), fingerprints, lambda: _draw(readers), known_tag)

    def _page(
        self, key: tuple[str, ...], fingerprint: object, draw: Callable[[], Page], known_tag: str | None
    ) -> tuple[str, Page | None]:
        tag = hashlib.sha256(repr((key, fingerprint)).encode(errors="replace")).hexdigest()[:32]
        if tag == known_tag:
            return tag, None
        cached = self._pages.pop(key, None)
        if cached is None or cached[0] != tag:
            cached = (tag, draw())
        self._pages[key] = cached
        while len(self._pages) > _MAX_PAGES:
            self._pages.popitem(last=False)
        return cached

    def _draw_overview(self) -> Page:
        return Page(render_template("overview.html.jinja", LAYOUT, root=str(self.runs.root), rows=self.runs.rows()))

    def _reader(self, folder: RunFolder) -> RunReader:
        reader = self._readers.pop(folder.name, None) or RunReader(folder)
        self._readers[folder.name] = reader
        while len(self._readers) > _MAX_READERS:
            self._readers.popitem(last=False)
        return reader


def message_page(title: str, text: str, status: int) -> Page:
    """A page with a message, such as an error."""
    return Page(render_template("message.html.jinja", LAYOUT, title=title, text=text), status)


def _problem(found: Mapping[str, RunFolder | None], root: Path) -> tuple[str, str, int] | None:
    """Title, text and HTTP status for an invalid choice of runs; None if it is valid."""
    missing = [name for name, folder in found.items() if folder is None]
    if missing:
        return "No such run", f"There is no run {', '.join(map(repr, missing))} in {root}, or no longer.", 404
    if not found:
        return "No run chosen", "Choose one or more in the list of all runs.", 400
    if len(found) > SERIES_COLOURS:
        return "Too many runs", f"{len(found)} runs are chosen; one chart can show at most {SERIES_COLOURS}.", 400
    return None


def _draw(readers: dict[str, RunReader]) -> Page:
    contents = {name: reader.read() for name, reader in readers.items()}
    if len(contents) == 1:
        return Page(render_report(next(iter(contents.values())), LAYOUT))
    return Page(render_comparison(contents, LAYOUT))
