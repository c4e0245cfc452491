"""The Python interface from its docstrings; the names are those that the public packages list."""

import importlib
import inspect
import pkgutil
import re
from collections import defaultdict
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from generate.pages import Pages, toctree

if TYPE_CHECKING:
    from docutils import nodes

_INTRO = """# Python

[`ssl3d`](ssl3d.md) pretrains and loads encoders, [`ssl3d_benchmarks`](ssl3d_benchmarks.md) scores them, and
[`ssl3d.testing`](ssl3d.testing.md) checks plugins. `ssl3d.api` is what plugins import:

"""

_PACKAGES = ("ssl3d", "ssl3d.testing", "ssl3d_benchmarks")
_TOPS = ("ssl3d", "ssl3d_benchmarks")


def public(package: str) -> dict[str, Any]:
    """Return the public functions and classes of a package by name; of `ssl3d.api` its modules too."""
    module = importlib.import_module(package)
    listed = {}
    for name in dir(module):
        thing = None if name.startswith("_") else getattr(module, name)
        if callable(thing):
            if getattr(thing, "__module__", "").partition(".")[0] in _TOPS:
                listed[name] = thing
        elif inspect.ismodule(thing) and package == "ssl3d.api":
            listed[name] = thing
    return listed


def _packages() -> list[str]:
    """The packages with a page: those of `_PACKAGES`, and the packages in `ssl3d_benchmarks`."""
    inside = importlib.import_module("ssl3d_benchmarks")
    below = [f"ssl3d_benchmarks.{one.name}" for one in pkgutil.iter_modules(inside.__path__) if one.ispkg]
    return [*_PACKAGES, *(package for package in below if public(package))]


def write(pages: Pages) -> None:
    """Writes a page for each package, and for each group of names of `ssl3d.api`."""
    listed = _packages()
    for package in listed:
        parts = [
            f"# {package}",
            _summary(importlib.import_module(package)),
            _entries(package, public(package)),
        ]
        pages.write(f"reference/python/{package}.md", "\n\n".join(parts))
    groups: dict[str, dict[str, dict[str, Any]]] = defaultdict(lambda: defaultdict(dict))
    for name, made in public("ssl3d.api").items():
        home = made.__name__ if inspect.ismodule(made) else made.__module__
        groups[_group_of(home)][home][name] = made
    rows = []
    for group, modules in sorted(groups.items()):
        parts = [f"# ssl3d.api: {group}\n"]
        for home, names in sorted(modules.items()):
            title = home.removeprefix("ssl3d.")
            parts += [f"## {title}\n", _summary(importlib.import_module(home)) + "\n"]
            parts.append(_entries("ssl3d.api", names))
            shown = ", ".join(f"`{name}`" for name in sorted(names))
            rows.append(f"| [{title}](api-{group}.md#{title.replace('.', '').lower()}) | {shown} |")
        pages.write(f"reference/python/api-{group}.md", "\n".join(parts))
        listed.append(f"api-{group}")
    table = "| part of ssl3d.api | names |\n|---|---|\n" + "\n".join(rows)
    pages.write("reference/python/index.md", f"{_INTRO}{table}\n\n" + toctree(listed, hidden=True))


def _group_of(home: str) -> str:
    """The folder that a module lies in, or `core`."""
    parts = home.split(".")
    spec = find_spec(home)
    folder = len(parts) > 2 or (spec is not None and spec.submodule_search_locations is not None)
    return parts[1] if folder else "core"


def _summary(module: Any) -> str:
    return inspect.cleandoc(module.__doc__ or "").split("\n\n")[0]


def _entries(package: str, names: dict[str, Any]) -> str:
    body = "\n".join(_entry(package, name, made) for name, made in sorted(names.items()))
    return f"```{{eval-rst}}\n{body}\n```\n"


def _entry(package: str, name: str, made: Any) -> str:
    if inspect.ismodule(made):
        return f".. automodule:: {made.__name__}\n   :members:\n"
    if inspect.isclass(made):
        return f".. autoclass:: {package}.{name}\n   :members:\n"
    return f".. autofunction:: {package}.{name}\n"


def link_type(app: Any, env: Any, node: Any, content: "nodes.Node") -> "nodes.Node | None":
    """Links a type in a signature to where `ssl3d.api` has it; others stay plain text.

    Signatures name types as the code does, by the module that defines them or by the bare name, and the
    pages are of the public names. In pages that people wrote nothing is let pass.
    """
    if not node.get("refdoc", "").startswith("reference/python/") or node.get("refdomain") != "py":
        return None
    name = node["reftarget"].rpartition(".")[2]
    domain = env.get_domain("py")
    for package in ("ssl3d.api", *_PACKAGES):
        if f"{package}.{name}" in domain.objects:
            found = domain.resolve_xref(
                env, node["refdoc"], app.builder, "obj", f"{package}.{name}", node, content
            )
            return found
    return content


def as_rst(app: Any, what: str, name: str, made: Any, options: Any, lines: list[str]) -> None:
    """Makes reStructuredText of a docstring: outside of backticks its signs mean themselves."""
    in_code = False
    for i, line in enumerate(lines):
        in_code = line.startswith((">>>", "    ")) and in_code
        parts = re.split(r"(`[^`]*`)", line)
        lines[i] = "".join(
            part if j % 2 else re.sub(r"(?<=\w)_(?=\W|$)|(?<![\w:])[*|](?=\S)", r"\\\g<0>", part)
            for j, part in enumerate(parts)
        )


def dashes(app: Any, document: "nodes.document") -> None:
    """Puts a dash between a parameter and its description, where Sphinx leaves it to smart quotes."""
    from docutils import nodes

    for text in list(document.findall(nodes.Text)):
        if text == " -- " and text.parent is not None:
            text.parent.replace(text, nodes.Text(" – "))
