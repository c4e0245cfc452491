"""The pages of the site that follow from the code, the results and the notebooks; none is committed."""

from pathlib import Path

from generate import commands, notebooks, plugins, python_api, repository, speed, suites
from generate.pages import Pages

GENERATED = (
    "_extra",
    "explanation/proxies.md",
    "explanation/results",
    "explanation/speed-gpu.inc",
    "explanation/speed-proxies.inc",
    "notebooks",
    "project",
    "reference/benchmarks",
    "reference/commands",
    "reference/encoders",
    "reference/proxies",
    "reference/python",
    "reference/suites",
)
"""What is written here, files and folders below `docs/`; git ignores it."""


def write_pages(docs: Path, root: Path) -> None:
    """Writes every generated page, and removes those that are no longer wanted.

    Args:
        docs: Folder of the site's sources.
        root: Root of the repository.
    """
    pages = Pages(docs, root)
    for part in (commands, plugins, suites, python_api, repository, speed, notebooks):
        part.write(pages)
    pages.finish(GENERATED)


def is_generated(docs: Path, page: Path) -> bool:
    """Return whether a file below `docs/` is one of those."""
    name = page.relative_to(docs).as_posix()
    return any(name == one or name.startswith(f"{one}/") for one in GENERATED)
