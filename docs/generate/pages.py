"""Writing of pages: only what changed is written, so that a second build is quick."""

import re
from collections.abc import Iterable
from pathlib import Path


class Pages:
    """The generated files of one build.

    Attributes:
        docs: Folder of the site's sources.
        root: Root of the repository.
    """

    def __init__(self, docs: Path, root: Path) -> None:
        """Begins with no page."""
        self.docs = docs
        self.root = root
        self._kept: set[Path] = set()

    def write(self, name: str, content: str | bytes) -> None:
        """Writes one file below `docs/`, unless it holds this content already."""
        path = self.docs / name
        data = content.encode("utf-8") if isinstance(content, str) else content
        self._kept.add(path)
        if not path.is_file() or path.read_bytes() != data:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def finish(self, folders: Iterable[str]) -> None:
        """Deletes what earlier builds wrote into the generated folders and this one did not."""
        for folder in folders:
            for path in sorted((self.docs / folder).rglob("*")):
                if path.is_file() and path not in self._kept:
                    path.unlink()


def toctree(names: Iterable[str], hidden: bool = False) -> str:
    """A table of contents of these pages."""
    options = ":hidden:\n" if hidden else ":maxdepth: 1\n"
    return "```{toctree}\n" + options + "\n" + "\n".join(names) + "\n```\n"


def cell(text: str) -> str:
    """Text as it may stand in a cell of a Markdown table."""
    return " ".join(prose(text).split()).replace("|", r"\|")


def prose(text: str) -> str:
    """Plain text of a docstring as Markdown: only what stands in backticks keeps its signs."""
    parts = re.split(r"(`[^`\n]+(?:\n[^`\n]+)?`)", text)
    return "".join(
        part if i % 2 else re.sub(r"([<>*_$\[\]])", r"\\\1", part) for i, part in enumerate(parts)
    )
