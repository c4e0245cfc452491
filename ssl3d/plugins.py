"""Looks up proxies, encoders, benchmarks and commands through entry points."""

from __future__ import annotations

import difflib
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ssl3d.errors import PluginError

PROXIES = "ssl3d.proxies"
ENCODERS = "ssl3d.encoders"
BENCHMARKS = "ssl3d.benchmarks"
COMMANDS = "ssl3d.commands"


@cache
def _installed(group: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in sorted(entry_points(group=group), key=lambda p: p.name)}


def names(group: str) -> list[str]:
    """The names registered in an entry-point group, sorted; imports none of them."""
    return list(_installed(group))


def load(group: str, name: str) -> Any:
    """Imports one plugin.

    Raises:
        PluginError: The name is not registered (with suggestions), or its module does not import.
    """
    points = _installed(group)
    kind = group.rpartition(".")[2].removesuffix("s").replace("proxie", "proxy")
    if name not in points:
        close = difflib.get_close_matches(name, points, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise PluginError(f"unknown {kind} {name!r}.{hint} Available: {', '.join(points) or 'none'}")
    point = points[name]
    try:
        return point.load()
    except Exception as error:
        source = f" of {point.dist.name} {point.dist.version}" if point.dist else ""
        raise PluginError(
            f"{kind} {name!r}{source} ({point.value}) does not import: {type(error).__name__}: {error}"
        ) from error


def load_all(group: str) -> tuple[dict[str, Any], dict[str, PluginError]]:
    """Imports every plugin of a group; those that fail are returned by name and break nothing."""
    loaded, failed = {}, {}
    for name in names(group):
        try:
            loaded[name] = load(group, name)
        except PluginError as error:
            failed[name] = error
    return loaded, failed


def name_of(group: str, plugin: type) -> str:
    """The name under which a class is registered, else its class name in lower case."""
    value = f"{plugin.__module__}:{plugin.__qualname__}"
    for name, point in _installed(group).items():
        if point.value == value:
            return name
    return plugin.__name__.lower()
