"""Pages that are files of the repository elsewhere: contributing, changes, results."""

import os
import posixpath
import re
from functools import partial
from pathlib import Path

from generate.pages import Pages, toctree

_FILES = {"CONTRIBUTING.md": "project/contributing.md", "CHANGELOG.md": "project/changelog.md"}
_RESULTS = "benchmarks/results"

_LINK = re.compile(r"(?<!`)(!?\[[^\]]*\]\()([^)\s#]+)((?:#[^)\s]*)?\))")


def write(pages: Pages) -> None:
    """Writes the pages; what they link to comes along, pages as pages and files as files."""
    found = _pages(pages.root)
    below = [posixpath.basename(page).removesuffix(".md") for page in found.values() if "results/" in page]
    for source, page in found.items():
        text = (pages.root / source).read_text(encoding="utf-8")
        if source == f"{_RESULTS}/README.md":
            text += "\n" + toctree([name for name in below if name != "index"], hidden=True)
        pages.write(page, _LINK.sub(partial(_link, pages, found, source), text))


def _pages(root: Path) -> dict[str, str]:
    """Return the page of each file: two of the root, and every README of the results."""
    found = dict(_FILES)
    for path in sorted((root / _RESULTS).rglob("README.md")):
        name = "-".join(path.parent.relative_to(root / _RESULTS).parts) or "index"
        found[path.relative_to(root).as_posix()] = f"explanation/results/{name}.md"
    return found


def _link(pages: Pages, found: dict[str, str], source: str, link: re.Match[str]) -> str:
    before, target, after = link.groups()
    page = found[source]
    if re.match(r"[a-z]+:", target):
        return link[0]
    file = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if (pages.root / file).is_dir():
        file = f"{file}/README.md"
    if file == "README.md":
        return before + _relative(page, "index.md") + after
    if file in found:
        return before + _relative(page, found[file]) + after
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
