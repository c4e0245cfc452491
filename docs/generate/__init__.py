"""The pages of the site that follow from the code, the results and the notebooks; none is committed."""

from pathlib import Path

from generate import commands, notebooks, plugins, python_api, repository, suites
from generate.pages import Pages

FOLDERS = (
    "notebooks",
    "project",
    "reference/commands",
    "reference/proxies",
    "reference/encoders",
    "reference/benchmarks",
    "reference/suites",
    "reference/python",
    "explanation/results",
    "explanation/proxies.md",
    "_extra",
)
"""What is written here, below `docs/`; git ignores it."""


def write_pages(docs: Path) -> None:
    """Writes every generated page, and removes those that are no longer wanted."""
    pages = Pages(docs)
    for part in (commands, plugins, suites, python_api, repository, notebooks):
        part.write(pages)
    pages.finish(FOLDERS)
