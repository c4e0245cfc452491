"""What every test here needs: the commands of before, the numbers of before, and a copy of the files."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def made():
    """The module that made the files."""
    spec = importlib.util.spec_from_file_location("made_before", HERE / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def kept():
    """What the code of before found."""
    return json.loads((HERE / "kept.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def same_machine(made, kept):
    """Whether sums come out here to the last bit as where the files were made."""
    return made.machine() == kept["machine"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A copy of all files in a folder of its own, the working directory of the test."""
    import torch

    folder = shutil.copytree(
        HERE, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("*.py", "__pycache__")
    )
    monkeypatch.chdir(folder)
    monkeypatch.setenv("SSL3D_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield folder
    torch.set_num_threads(threads)
