"""The examples in docstrings run, and give what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {
    "proxies": "ssl3d_proxies",
    "ssl3d/encoders": "ssl3d.encoders",
    "ssl3d/heads": "ssl3d.heads",
    "ssl3d/objectives": "ssl3d.objectives",
    "ssl3d/views": "ssl3d.views",
}
"""Folders whose files with examples are tested, and their packages; add rooms as they get examples."""
MODULES = [
    f"{package}.{path.stem}"
    for folder, package in ROOMS.items()
    for path in sorted((ROOT / folder).glob("*.py"))
    if ">>>" in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    outcome = doctest.testmod(importlib.import_module(name), verbose=False)
    assert outcome.attempted and not outcome.failed
