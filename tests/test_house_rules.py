"""The house plan's lines: who imports whom, what is packaged, what is declared."""

import ast
import configparser
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import networkx
import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"ssl3d": "ssl3d", "proxies": "ssl3d_proxies", "benchmarks": "ssl3d_benchmarks"}
# Needed by what is imported: torch.utils.tensorboard writes with the one, lightly imports the other.
BEHIND_OTHERS = {"tensorboard", "torchvision"}
PUBLIC = {"encoder_from", "load_encoder", "load_model", "load_proxies", "pretrain", "resume"}
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")


def modules():
    for folder, package in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = ".".join([package, *path.relative_to(ROOT / folder).with_suffix("").parts])
            yield name.removesuffix(".__init__"), path


MODULES = dict(modules())


def imports(path):
    """What a file imports, inside functions and for type checkers too: (module, name or "")."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from named(node.module, node)
    stub = path.with_suffix(".pyi")  # what lazy_loader imports when it is asked for
    for node in ast.parse(stub.read_text(encoding="utf-8")).body if stub.is_file() else ():
        if isinstance(node, ast.ImportFrom):
            package = next(name for name, one in MODULES.items() if one == path.parent / "__init__.py")
            yield from named(f"{package}.{node.module}" if node.module else package, node)


def named(module, node):
    """The modules that `from module import ...` names: `from ssl3d import plugins` is ssl3d.plugins."""
    for alias in node.names:
        whole = f"{module}.{alias.name}"
        yield (whole, "") if whole in MODULES else (module, alias.name)


def import_graph():
    """Every module of the three packages, and an edge to each of theirs that it imports, with the names."""
    graph = networkx.DiGraph()
    graph.add_nodes_from(MODULES)
    for name, path in MODULES.items():
        for imported, what in imports(path):
            if imported in MODULES and imported != name:
                graph.add_edge(name, imported)
                graph.edges[name, imported].setdefault("names", []).append(what or "the module")
    return graph


def rooms(graph):
    """For every package its files and folders, with an edge where anything in one imports from another."""
    found = {}
    for name, imported in graph.edges:
        here, there = name.split("."), imported.split(".")
        shared = next((n for n, pair in enumerate(zip(here, there)) if pair[0] != pair[1]), 0)
        if shared:
            package = found.setdefault(".".join(here[:shared]), networkx.DiGraph())
            package.add_edge(here[shared], there[shared], names=[f"{name} -> {imported}"])
    return found


def circles(graph):
    parts = networkx.strongly_connected_components(graph)
    return {frozenset(part) for part in parts if len(part) > 1}


def ties(graph, circle):
    """The imports that tie a circle, a line each."""
    return "\n".join(
        f"{a} -> {b}: {', '.join(sorted(set(names)))}"
        for a, b, names in sorted(graph.subgraph(circle).edges(data="names"))
    )


def test_no_import_runs_in_a_circle():
    graph = import_graph()
    assert not circles(graph), "\n\n".join(ties(graph, circle) for circle in circles(graph))


def test_no_folder_imports_from_one_that_imports_from_it():
    for package, graph in rooms(import_graph()).items():
        assert not circles(graph), f"{package}: " + "\n".join(ties(graph, c) for c in circles(graph))


def top_level_imports(path):
    return {name.split(".")[0] for name, _ in imports(path)}


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=lambda v: v if isinstance(v, str) else "")
def test_imports_keep_to_the_plan(name, path):
    package = name.split(".")[0]
    for imported, what in imports(path):
        target = imported.split(".")[0]
        if package == "ssl3d":
            assert target not in ("ssl3d_proxies", "ssl3d_benchmarks"), f"{name} imports {imported}"
        elif target == "ssl3d":
            door = imported == "ssl3d.api" or (imported == "ssl3d" and what in PUBLIC | {""})
            assert door, f"{name} imports {what} from {imported}, not from ssl3d.api"
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
        if path.parent.name == "scripts":
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
