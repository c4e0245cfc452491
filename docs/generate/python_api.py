"""The Python interface from its docstrings; the names are those that the public packages list."""

import importlib
import inspect
import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from generate.pages import Pages, toctree

if TYPE_CHECKING:
    from docutils import nodes

_INTRO = """# Python

[`ssl3d`](ssl3d.md) pretrains and loads encoders, [`ssl3d_benchmarks`](ssl3d_benchmarks.md) scores them, and
[`ssl3d.testing`](ssl3d.testing.md) checks plugins. `ssl3d.api` is what plugins import:

"""

_PACKAGES = ("ssl3d", "ssl3d.testing", "ssl3d_benchmarks")


def public(package: str) -> dict[str, Any]:
    """Return the public functions and classes of a package by name."""
    module = importlib.import_module(package)
    names = set(getattr(module, "_HOME", ())) or {
        name
        for name, made in vars(module).items()
        if getattr(made, "__module__", "") == package and name[0] != "_"
    }
    return {name: getattr(module, name) for name in sorted(names)}


def write(pages: Pages) -> None:
    """Writes a page for each package, and for each group of names of `ssl3d.api`."""
    listed = []
    for package in _PACKAGES:
        summary = _summary(importlib.import_module(package))
        parts = [f"# {package}", summary, _entries(package, public(package))]
        pages.write(f"reference/python/{package}.md", "\n\n".join(parts))
        listed.append(package)
    groups: dict[str, dict[str, dict[str, Any]]] = defaultdict(lambda: defaultdict(dict))
    for name, made in public("ssl3d.api").items():
        home = made.__name__ if inspect.ismodule(made) else made.__module__
        groups[home.split(".")[1]][home][name] = made
    rows = []
    for group, modules in sorted(groups.items()):
        parts = [f"# ssl3d.api: {group}\n"]
        for home, names in sorted(modules.items()):
            if len(modules) > 1:
                parts.append(f"## {home.split('.', 2)[-1]}\n")
            parts.append(_summary(importlib.import_module(home)) + "\n")
            parts.append(_entries("ssl3d.api", names))
            listed_names = ", ".join(f"`{name}`" for name in sorted(names))
            rows.append(f"| [{home.removeprefix('ssl3d.')}](api-{group}.md) | {listed_names} |")
        pages.write(f"reference/python/api-{group}.md", "\n".join(parts))
        listed.append(f"api-{group}")
    table = "| part of ssl3d.api | names |\n|---|---|\n" + "\n".join(rows)
    pages.write("reference/python/index.md", f"{_INTRO}{table}\n\n" + toctree(listed, hidden=True))


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
