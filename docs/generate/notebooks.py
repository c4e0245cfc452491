"""The notebooks as pages, with the outputs that they were saved with."""

from generate.pages import Pages, toctree

_INTRO = """# Notebooks

The notebooks lie in `notebooks/` of the repository. They run on the built-in phantoms in a few minutes
without a GPU, and are shown here with the outputs of such a run.

"""


def write(pages: Pages) -> None:
    """Copies the notebooks beside the other sources."""
    names = []
    for path in sorted((pages.root / "notebooks").glob("*.ipynb")):
        pages.write(f"notebooks/{path.name}", path.read_bytes())
        names.append(path.stem)
    pages.write("notebooks/index.md", _INTRO + toctree(names))
