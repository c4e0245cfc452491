"""Proxies, encoders, benchmarks and commands by name: entry points; for the first two, files as well."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import os
import re
import sys
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from ssl3d.errors import PluginError
from ssl3d.plugin_files import code_digest, content_digest, load_file, what_failed

PROXIES = "ssl3d.proxies"
ENCODERS = "ssl3d.encoders"
BENCHMARKS = "ssl3d.benchmarks"
COMMANDS = "ssl3d.commands"

NAMED = "SSL3D_PLUGINS"
"""Environment variable with files and module:Class, between commas, whose plugins count as installed."""

_BASES = {PROXIES: ("ssl3d.proxy", "Proxy"), ENCODERS: ("ssl3d.encoder", "Encoder")}
_NEEDED = {PROXIES: ("paper", "main"), ENCODERS: ("paper",)}
_FILE = re.compile(r"(.+\.py)(?::([A-Za-z_]\w*))?")
_OBJECT = re.compile(r"([A-Za-z_]\w*(?:\.\w+)*):([A-Za-z_]\w*)")


class Source(NamedTuple):
    """Source of a plugin that was named by its file or its module.

    Attributes:
        spec: Words that name it from any folder.
        sha256: Hash of the file's content; empty where there is no file.
        code: Hash of what the file computes (`ssl3d.plugin_files.code_digest`).
    """

    spec: str
    sha256: str
    code: str


# Of this process: what was named by file or module, by class and by name (the last of a name).
_sources: dict[tuple[str, Any], tuple[str, Source]] = {}
_by_name: dict[tuple[str, str], Any] = {}


@cache
def _installed(group: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in sorted(entry_points(group=group), key=lambda p: p.name)}


def names(group: str) -> list[str]:
    """List the names registered in an entry-point group, sorted, without importing them."""
    return list(_installed(group))


def load(group: str, name: str) -> Any:
    """Load one plugin by its name.

    Known are the registered ones, what `find` has found in this process, and what the environment variable
    SSL3D_PLUGINS names. No file is run on the word of `name` itself, which may come from a stranger's card.

    Raises:
        PluginError: The name is not known (with suggestions), or its module does not import.
    """
    points = _installed(group)
    if name not in points:
        plugin = _by_name.get((group, name)) or _from_environment(group, name)
        if plugin is not None:
            return plugin
        raise PluginError(_unknown(group, name))
    point = points[name]
    try:
        return point.load()
    except Exception as error:
        source = f" of {point.dist.name} {point.dist.version}" if point.dist else ""
        raise PluginError(
            f"{_kind(group)} {name!r}{source} ({point.value}) does not import: "
            f"{type(error).__name__}: {error}"
        ) from error


def find(group: str, spec: str) -> tuple[str, Any]:
    """Find a plugin and its name, from what a user calls it.

    Args:
        group: Entry-point group: `PROXIES` or `ENCODERS`.
        spec: Registered name; `PATH/file.py`, for the one class of the kind that the file defines;
            `PATH/file.py:Class`; or `module:Class`, of a module that can be imported or that lies in the
            working directory.

    Returns:
        Name and class. The name of a class that is not registered is its attribute `name`, else that of
        its file.

    Raises:
        PluginError: There is no such plugin, it does not import, or its name is taken.
    """
    file, of_module = _FILE.fullmatch(spec), _OBJECT.fullmatch(spec)
    if file is not None:
        path = Path(file[1]).expanduser().resolve()
        title = f"{_kind(group)} {file[1]}"
        module = load_file(path, title)
        plugin = _member(group, module, file[2], title)
        source_spec = f"{path}:{plugin.__name__}"
    elif of_module is not None:
        title = f"{_kind(group)} {spec}"
        module = _module(of_module[1], title)
        plugin = _member(group, module, of_module[2], title)
        registered = _registered_as(group, plugin)
        if registered is not None:
            return registered, plugin
        own = getattr(module, "__file__", None)
        path = Path(own) if own else Path(f"{of_module[1].rpartition('.')[2]}.py")
        source_spec = spec
    else:
        return spec, load(group, spec)
    content = path.read_bytes() if path.is_file() else b""
    name = _own_name(plugin, path.stem, title)
    if name in _installed(group):
        return name, _same_as_installed(group, name, plugin, content, title)
    source = Source(
        source_spec, content_digest(content) if content else "", code_digest(content) if content else ""
    )
    _sources[group, plugin] = name, source
    _by_name[group, name] = plugin
    return name, plugin


def remember(group: str, plugin: type) -> str:
    """Remember a class that was handed over from Python by its name, in this process.

    Returns:
        Name of the class.

    Raises:
        PluginError: Another class of that name is installed, and would be taken for it later.
    """
    name = name_of(group, plugin)
    if _registered_as(group, plugin) is None and (group, plugin) not in _sources:
        if name in _installed(group):
            raise PluginError(
                f"{_kind(group)} {plugin.__name__}: another {_kind(group)} called {name!r} is installed; "
                f'give the class another `name`, as in name = "my_{name}"'
            )
        _by_name[group, name] = plugin
    return name


def load_all(group: str) -> tuple[dict[str, Any], dict[str, PluginError]]:
    """Load every plugin of a group; those that fail are returned by name and break nothing."""
    loaded, failed = {}, {}
    for name in names(group):
        try:
            loaded[name] = load(group, name)
        except PluginError as error:
            failed[name] = error
    return loaded, failed


def name_of(group: str, plugin: type) -> str:
    """Return the name under which a class is registered or was found, else its `name`, else its class's."""
    registered = _registered_as(group, plugin)
    if registered is not None:
        return registered
    if (group, plugin) in _sources:
        return _sources[group, plugin][0]
    own = getattr(plugin, "name", None)
    return own if isinstance(own, str) else plugin.__name__.lower()


def spec_of(group: str, plugin: type) -> str:
    """Return the words that name a class to `find` from any folder."""
    source = _sources.get((group, plugin))
    return source[1].spec if source else name_of(group, plugin)


def source_of(group: str, plugin: type) -> dict[str, str] | None:
    """Return what records say of the origin of a class; None for what is installed."""
    source = _sources.get((group, plugin))
    return {"from": source[1].spec, "sha256": source[1].sha256, "code": source[1].code} if source else None


def load_recorded(group: str, name: str, record: Any) -> Any:
    """Load a plugin by its name, where a checkpoint or a card records its origin.

    Its file is not run on their word, as they may be a stranger's.

    Args:
        group: Entry-point group.
        name: Name of the plugin.
        record: Answer of `source_of` at that time; None for a plugin that was installed.

    Raises:
        PluginError: The plugin is not known here (the message says how to make it known), or computes
            something else than then.
    """
    if not isinstance(record, dict):
        return load(group, name)
    try:
        plugin = load(group, name)
    except PluginError as error:
        if name in _installed(group):
            raise
        raise PluginError(
            f"{_kind(group)} {name!r} was defined in {record.get('from')}, which is run only where you say "
            f"so: set {NAMED}={record.get('from')}, or install it as a package"
        ) from error
    changed = change_of(group, plugin, record)
    if changed:
        raise PluginError(f"{_kind(group)} {name!r}: {changed}")
    return plugin


def change_of(group: str, plugin: type, record: dict[str, str]) -> str:
    """Say how the code of a class differs from a record; empty if it does not, or is installed now."""
    now = source_of(group, plugin)
    if now is None or now["sha256"] == record.get("sha256") or now["code"] == record.get("code"):
        return ""
    then = str(record.get("sha256"))
    return f"{now['from']} has changed (sha256 {then[:12]} then, {now['sha256'][:12]} now)"


# ------------------------------------------------------------------------------------------------


def _kind(group: str) -> str:
    return group.rpartition(".")[2].removesuffix("s").replace("proxie", "proxy")


def _unknown(group: str, name: str) -> str:
    points = _installed(group)
    close = difflib.get_close_matches(name, points, n=3, cutoff=0.5)
    if group in _BASES and os.path.isfile(f"{name}.py"):  # false of a name that no file can have, too
        close = [f"the file here, {name}.py"]
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    message = f"unknown {_kind(group)} {name!r}.{hint} Available: {', '.join(points) or 'none'}"
    if group in _BASES:
        message += (
            "; a file (PATH/file.py) or module:Class may be named too, and a package's plugins only when "
            "it is installed (pip install -e .)"
        )
    return message


def _from_environment(group: str, name: str) -> Any:
    """Find the class of a name among those that SSL3D_PLUGINS names; None if it is not there."""
    if group not in _BASES:
        return None
    for spec in filter(None, map(str.strip, os.environ.get(NAMED, "").split(","))):
        if _FILE.fullmatch(spec) is None and _OBJECT.fullmatch(spec) is None:
            raise PluginError(f"{NAMED}: {spec!r} is neither PATH/file.py nor module:Class")
        try:
            own_name, plugin = find(group, spec)
        except _NoneOfIt:
            continue  # it is of the other kind
        if own_name == name:
            return plugin
    return None


class _NoneOfIt(PluginError):
    """Error of a file or a module that has no class of the kind."""


def _module(name: str, title: str) -> ModuleType:
    here = str(Path.cwd())
    # Last, so that a file of the working directory hides nothing. It stays: spawned processes need it too.
    if here not in sys.path:
        sys.path.append(here)
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise PluginError(f"{title}: {what_failed(error)}") from error


def _member(group: str, module: ModuleType, wanted: str | None, title: str) -> Any:
    """Find the class of a module that is meant, and check it as far as a run needs it.

    Raises:
        PluginError: There is none, there are several, or it lacks something.
    """
    home, base_name = _BASES[group]
    base = getattr(importlib.import_module(home), base_name)
    own = {
        name: plugin
        for name, plugin in vars(module).items()
        if inspect.isclass(plugin) and issubclass(plugin, base) and plugin.__module__ == module.__name__
    }
    there = {name: m for name, m in own.items() if not name.startswith("_") and not inspect.isabstract(m)}
    if wanted is not None:
        plugin = getattr(module, wanted, None)
        if plugin is None:
            raise PluginError(
                f"{title}: defines no {wanted} (it has {', '.join(own) or 'no ' + base_name})"
            )
        if not inspect.isclass(plugin) or not issubclass(plugin, base):
            raise _NoneOfIt(f"{title}: {wanted} is no subclass of ssl3d.api.{base_name}")
    elif len(there) == 1:
        (plugin,) = there.values()
    elif there:
        raise PluginError(
            f"{title}: defines {len(there)} classes of the kind, {' and '.join(there)}; name one of them, "
            f"as in {Path(str(module.__file__)).name}:{next(iter(there))}"
        )
    else:
        left = [f"{name} lacks {_unwritten(m)}" for name, m in own.items() if inspect.isabstract(m)]
        why = f" ({'; '.join(left)})" if left else ""
        raise _NoneOfIt(f"{title}: defines no subclass of ssl3d.api.{base_name}{why}")
    lacking = [name for name in _NEEDED[group] if not isinstance(getattr(plugin, name, None), str)]
    if not dataclasses.is_dataclass(getattr(plugin, "Config", None)):
        lacking.insert(0, "Config (a dataclass)")
    if inspect.isabstract(plugin):
        lacking.append(_unwritten(plugin))
    if lacking:
        raise PluginError(f"{title}: class {plugin.__name__} lacks {', '.join(lacking)}")
    return plugin


def _unwritten(plugin: Any) -> str:
    return ", ".join(sorted(plugin.__abstractmethods__))


def _own_name(plugin: Any, stem: str, title: str) -> str:
    name = getattr(plugin, "name", None)
    if name is None:
        return re.sub(r"\W", "_", stem)
    if not isinstance(name, str) or not re.fullmatch(r"\w+", name):
        raise PluginError(f"{title}: its name is {name!r}, must be letters, digits and underscores")
    return name


def _registered_as(group: str, plugin: type) -> str | None:
    value = f"{plugin.__module__}:{plugin.__qualname__}"
    return next((name for name, point in _installed(group).items() if point.value == value), None)


def _same_as_installed(group: str, name: str, plugin: Any, content: bytes, title: str) -> Any:
    """Return the installed plugin of a name if it is this very text, which its author has installed."""
    installed = load(group, name)
    file = Path(inspect.getfile(installed))
    same = installed.__name__ == plugin.__name__ and content and file.is_file()
    if same and file.read_bytes() == content:
        return installed
    raise PluginError(
        f"{title}: another {_kind(group)} called {name!r} is installed; give the class another `name`, as "
        f'in name = "my_{name}"'
    )
