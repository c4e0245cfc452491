"""The examples in the docstrings run, and give what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"ssl3d": "ssl3d", "proxies": "ssl3d_proxies", "benchmarks": "ssl3d_benchmarks"}
MODULES = sorted(
    ".".join((package, *path.relative_to(ROOT / folder).with_suffix("").parts)).removesuffix(".__init__")
    for folder, package in PACKAGES.items()
    for path in (ROOT / folder).rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("module", MODULES)
def test_examples_give_what_they_say(module, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL3D_CACHE", str(tmp_path))
    result = doctest.testmod(importlib.import_module(module))
    assert not result.failed
