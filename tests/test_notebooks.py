"""The notebooks run from top to bottom, on phantoms."""

import os
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
LARGEST = 200_000  # bytes, outputs and all
SMALLER = {
    r"phantoms:60": "phantoms:40",
    r"crop(\": \(| )24(,?) 24(,?) 24": r"crop\g<1>16\2 16\3 16",
    r"\bwidth(\": |=| )16": r"width\g<1>4",
    r"\bsteps(=|: )\d+": r"steps\g<1>8",
    r"every=\d+": "every=4",
    r"untrained 5": r"\g<0> --samples 64",
    r'target="masks"': r"\g<0>, untrained=1, samples=64",
}
"""What makes a notebook short: fewer people and steps, smaller crops and networks."""


def small(source):
    for pattern, instead in SMALLER.items():
        source = re.sub(pattern, instead, source)
    return source


def run(path, folder, monkeypatch, change=str):
    monkeypatch.setenv("SSL3D_CACHE", os.environ.get("SSL3D_CACHE", str(folder / "cache")))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(folder / "runtime"))
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    book = nbformat.read(path, as_version=4)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.source = change(cell.source)
    nbclient.NotebookClient(book, timeout=800, resources={"metadata": {"path": str(folder)}}).execute()


@pytest.mark.long
@pytest.mark.timeout(900)  # of a busy machine
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    run(path, tmp_path, monkeypatch, small)


@pytest.mark.slow
@pytest.mark.timeout(900)  # of a busy machine
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_at_its_full_size(path, tmp_path, monkeypatch):
    run(path, tmp_path, monkeypatch)


def test_every_notebook_is_made_smaller():
    for path in NOTEBOOKS:
        code = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        assert any(small(source) != source for source in code), path


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_and_has_no_error(path):
    assert path.stat().st_size < LARGEST
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    outputs = [output for cell in book.cells for output in cell.get("outputs", ())]
    assert outputs, "save it executed"
    assert not [output for output in outputs if output.output_type == "error"]
