"""The house plan's lines: who imports whom, what is packaged, what is declared."""

import ast
import configparser
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"ssl3d": "ssl3d", "proxies": "ssl3d_proxies", "benchmarks": "ssl3d_benchmarks"}
# Needed by what is imported: torch.utils.tensorboard writes with the one, lightly imports the other.
BEHIND_OTHERS = {"tensorboard", "torchvision"}
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")


def modules():
    for folder, package in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = ".".join([package, *path.relative_to(ROOT / folder).with_suffix("").parts])
            yield name.removesuffix(".__init__"), path


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def top_level_imports(path):
    return {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=lambda v: v if isinstance(v, str) else "")
def test_imports_keep_to_the_plan(name, path):
    package = name.split(".")[0]
    for imported in imports(path):
        target = imported.split(".")[0]
        if package == "ssl3d":
            assert target not in ("ssl3d_proxies", "ssl3d_benchmarks"), f"{name} imports {imported}"
        elif target == "ssl3d":
            assert imported in ("ssl3d", "ssl3d.api"), f"{name} imports {imported}, not ssl3d.api"
        if package == "ssl3d_proxies":
            assert target not in ("ssl3d_proxies", "ssl3d_benchmarks"), f"{name} imports {imported}"
        if package == "ssl3d_benchmarks":
            assert target != "ssl3d_proxies", f"{name} imports {imported}"


def test_the_packages_listed_are_those_on_disk():
    listed = set(SETUP["options"]["packages"].split())
    on_disk = set()
    for folder, package in PACKAGES.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            on_disk.add(".".join([package, *init.parent.relative_to(ROOT / folder).parts]))
    assert listed == on_disk


def test_declared_dependencies_are_exactly_those_imported():
    def plain(name):
        return re.sub(r"[-_.]+", "-", name).lower()

    def names(lines):
        return {plain(re.split(r"[\[<>=~!;]", line)[0].strip()) for line in lines.split("\n") if line}

    declared = names(SETUP["options"]["install_requires"])
    extras = SETUP["options.extras_require"]
    optional = set().union(*(names(lines) for extra, lines in extras.items() if extra != "dev")) - declared
    homes = packages_distributions()
    used = set()
    for _, path in modules():
        if path.parent.name == "benchmarks" and path.name.startswith("speed"):
            continue  # may compare with peers that are not dependencies
        for name in top_level_imports(path) - set(sys.stdlib_module_names) - set(PACKAGES.values()):
            used |= {plain(home) for home in homes.get(name, [name])} & (
                declared | {plain(homes.get(name, [name])[0])}
            )
    assert used | BEHIND_OTHERS | optional == declared | optional


def test_every_module_has_a_docstring():
    missing = [
        name
        for name, path in modules()
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not missing
