"""Pages that are files of the repository elsewhere: contributing, changes, results."""

import os
import posixpath
import re
from functools import partial
from pathlib import Path

from generate.pages import Pages, toctree

_PAGES = {
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "benchmarks/results/README.md": "explanation/results/index.md",
    "benchmarks/results/gallery/README.md": "explanation/results/gallery.md",
}
"""File of the repository -> page of the site."""

_LINK = re.compile(r"(?<!`)(!?\[[^\]]*\]\()([^)\s#]+)((?:#[^)\s]*)?\))")


def write(pages: Pages) -> None:
    """Writes the pages; what they link to comes along, pages as pages and files as files."""
    for source, page in _PAGES.items():
        text = (pages.root / source).read_text(encoding="utf-8")
        if source.endswith("results/README.md"):
            text += "\n" + toctree(["gallery"], hidden=True)
        pages.write(page, _LINK.sub(partial(_link, pages, source, page), text))


def _link(pages: Pages, source: str, page: str, link: re.Match[str]) -> str:
    before, target, after = link.groups()
    if re.match(r"[a-z]+:", target):
        return link[0]
    file = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if file in _PAGES:
        return before + _relative(page, _PAGES[file]) + after
    if file.startswith("docs/"):
        return before + _relative(page, file.removeprefix("docs/")) + after
    path = pages.root / file
    if not path.is_file():
        raise FileNotFoundError(f"{source} links to {target}, which is no file")
    if before.startswith("!"):
        copy = posixpath.join(posixpath.dirname(page), posixpath.basename(file))
        pages.write(copy, path.read_bytes())
        return before + _relative(page, copy) + after
    return _extra(pages, page, path, file, before[1:-2])


def _extra(pages: Pages, page: str, path: Path, file: str, text: str) -> str:
    """Copies a file that is no page (a report, a table) to the site as it is; returns a link to it."""
    copy = f"files/{file.removeprefix('benchmarks/')}"
    pages.write(f"_extra/{copy}", path.read_bytes())
    # HTML, since Sphinx would make a download of a file that is to be looked at in the browser.
    return f'<a href="{_relative(page, copy)}">{text}</a>'


def _relative(page: str, target: str) -> str:
    return os.path.relpath(target, posixpath.dirname(page)).replace(os.sep, "/")
