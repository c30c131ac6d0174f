"""MkDocs hooks: pages made at build time, and links from the guides to files of the repository.

The pages of `GENERATED` do not lie in `docs/`: the configuration reference is read from the config models, and the architecture,
the contributing guide and the changelog are the files that a reader of the repository sees. A link of any page to a repository
file outside `docs/` leads to a copy of that file in the site, below `source/`.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {
    "rlhf_ray/README.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "README.md": "index.md",
}
"""Repository file → the page of the site that shows it."""

_LINK = re.compile(r"(?<=\]\()(?!https?://|#|mailto:)(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?(?=\))")


def _configuration() -> str:
    from rlhf_ray.config.reference import config_reference

    return config_reference()


def _page(source: str) -> Callable[[], str]:
    return lambda: relink((ROOT / source).read_text(), source, PAGES[source])


GENERATED: dict[str, Callable[[], str]] = {
    "configuration.md": _configuration,
    "architecture.md": _page("rlhf_ray/README.md"),
    "contributing.md": _page("CONTRIBUTING.md"),
    "changelog.md": _page("CHANGELOG.md"),
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and a copy of each repository file that a page links to."""
    linked: set[str] = set()
    for path, content in GENERATED.items():
        files.append(File.generated(config, path, content=content()))
    pages = [f"docs/{file.src_uri}" for file in files.documentation_pages() if file.src_uri not in GENERATED]
    for name in (*(PAGES.keys() - {"README.md"}), *pages):
        linked |= set(_targets((ROOT / name).read_text(), name))
    for target in sorted(linked - PAGES.keys()):
        if (ROOT / target).is_file() and not target.startswith("docs/"):
            files.append(File.generated(config, _copy(target), content=(ROOT / target).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point a guide's links to repository files at the site's copies of them."""
    uri = page.file.src_uri
    return markdown if uri in GENERATED else relink(markdown, f"docs/{uri}", uri)


def relink(markdown: str, source: str, page: str) -> str:
    """Markdown of the repository file `source` with the links that it needs as the site's `page`.

    Only links that lead out of `docs/`, or come from outside it, change.
    """

    def replace(match: re.Match[str]) -> str:
        target = _target(match["path"], source)
        if target.startswith("docs/"):
            destination = target.removeprefix("docs/")
        else:
            destination = PAGES.get(target) or _copy(target)
        relative = posixpath.relpath(destination, posixpath.dirname(page) or ".")
        return relative + (match["anchor"] or "")

    return _LINK.sub(replace, markdown)


def _targets(markdown: str, source: str) -> Iterator[str]:
    for match in _LINK.finditer(markdown):
        yield _target(match["path"], source)


def _target(path: str, source: str) -> str:
    """The repository path that a link of the repository file `source` leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), path))


def _copy(target: str) -> str:
    """Where the site keeps a repository file. A Markdown file is a page for MkDocs, so its copy is named as text."""
    return f"source/{target}.txt" if target.endswith(".md") else f"source/{target}"
