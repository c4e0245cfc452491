"""Looks up proxies, encoders, benchmarks and commands: entry points; for the first two, files as well."""

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
from ssl3d.plugin_files import code_digest, digest_of, load_file, what_failed

PROXIES = "ssl3d.proxies"
ENCODERS = "ssl3d.encoders"
BENCHMARKS = "ssl3d.benchmarks"
COMMANDS = "ssl3d.commands"

NAMED = "SSL3D_PLUGINS"
"""Environment variable: files and module:Class, with commas between, whose plugins count as installed."""

_BASES = {PROXIES: ("ssl3d.proxy", "Proxy"), ENCODERS: ("ssl3d.encoder", "Encoder")}
_NEEDED = {PROXIES: ("paper", "main"), ENCODERS: ("paper",)}
_FILE = re.compile(r"(.+\.py)(?::([A-Za-z_]\w*))?")
_OBJECT = re.compile(r"([A-Za-z_]\w*(?:\.\w+)*):([A-Za-z_]\w*)")


class Source(NamedTuple):
    """Where a plugin came from that was named by its file or its module.

    Attributes:
        spec: The words that name it from any folder.
        sha256: Of the file's content; empty where there is none.
        code: Of what the file computes, see `ssl3d.plugin_files.code_digest`.
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
    """The names registered in an entry-point group, sorted; imports none of them."""
    return list(_installed(group))


def load(group: str, name: str) -> Any:
    """Imports one plugin by its name.

    Besides what is registered: what `find` has found in this process, and what the environment variable
    SSL3D_PLUGINS names. No file is run on the word of `name` itself, which may come from a stranger's card.

    Raises:
        PluginError: The name is not known (with suggestions), or its module does not import.
    """
    points = _installed(group)
    if name not in points:
        found = _by_name.get((group, name)) or _from_environment(group, name)
        if found is not None:
            return found
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
    """A plugin and its name, from what a user calls it.

    Args:
        group: Of the entry points: `PROXIES` or `ENCODERS`.
        spec: A registered name; `PATH/file.py`, for the one class of the kind that the file defines;
            `PATH/file.py:Class`; or `module:Class`, of a module that can be imported or that lies in the
            working directory. The name of a class that is not registered is its attribute `name`, else
            that of its file.

    Raises:
        PluginError: There is none, it does not import, or its name is taken.
    """
    file, of_module = _FILE.fullmatch(spec), _OBJECT.fullmatch(spec)
    if file is not None:
        path = Path(file[1]).expanduser().resolve()
        title = f"{_kind(group)} {file[1]}"
        module = load_file(path, title)
        made = _member(group, module, file[2], title)
        source_spec = f"{path}:{made.__name__}"
    elif of_module is not None:
        title = f"{_kind(group)} {spec}"
        module = _module(of_module[1], title)
        made = _member(group, module, of_module[2], title)
        registered = _registered_as(group, made)
        if registered is not None:
            return registered, made
        own = getattr(module, "__file__", None)
        path = Path(own) if own else Path(f"{of_module[1].rpartition('.')[2]}.py")
        source_spec = spec
    else:
        return spec, load(group, spec)
    content = path.read_bytes() if path.is_file() else b""
    name = _own_name(made, path.stem, title)
    if name in _installed(group):
        return name, _same_as_installed(group, name, made, content, title)
    source = Source(
        source_spec, digest_of(content) if content else "", code_digest(content) if content else ""
    )
    _sources[group, made] = name, source
    _by_name[group, name] = made
    return name, made


def remember(group: str, plugin: type) -> str:
    """Makes a class that was handed over from Python known by its name, to this process.

    Returns:
        The name.

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
    """Imports every plugin of a group; those that fail are returned by name and break nothing."""
    loaded, failed = {}, {}
    for name in names(group):
        try:
            loaded[name] = load(group, name)
        except PluginError as error:
            failed[name] = error
    return loaded, failed


def name_of(group: str, plugin: type) -> str:
    """The name under which a class is registered or was found, else its own, else its class's."""
    registered = _registered_as(group, plugin)
    if registered is not None:
        return registered
    if (group, plugin) in _sources:
        return _sources[group, plugin][0]
    own = getattr(plugin, "name", None)
    return own if isinstance(own, str) else plugin.__name__.lower()


def spec_of(group: str, plugin: type) -> str:
    """What names a class to `find` from any folder."""
    found = _sources.get((group, plugin))
    return found[1].spec if found else name_of(group, plugin)


def source_of(group: str, plugin: type) -> dict[str, str] | None:
    """What records say of where a class came from; None for what is installed."""
    found = _sources.get((group, plugin))
    return {"from": found[1].spec, "sha256": found[1].sha256, "code": found[1].code} if found else None


def load_recorded(group: str, name: str, record: Any) -> Any:
    """A plugin by its name, where a checkpoint or a card says whence it came.

    Its file is not run on their word: who made them may be a stranger.

    Args:
        group: Of the entry points.
        name: Of the plugin.
        record: What `source_of` said of it then; None for one that was installed.

    Raises:
        PluginError: It is not known here (the message says how to make it known), or computes something
            else than then.
    """
    if not isinstance(record, dict):
        return load(group, name)
    try:
        made = load(group, name)
    except PluginError as error:
        if name in _installed(group):
            raise
        raise PluginError(
            f"{_kind(group)} {name!r} was defined in {record.get('from')}, which is run only where you say "
            f"so: set {NAMED}={record.get('from')}, or install it as a package"
        ) from error
    changed = change_of(group, made, record)
    if changed:
        raise PluginError(f"{_kind(group)} {name!r}: {changed}")
    return made


def change_of(group: str, plugin: type, record: dict[str, str]) -> str:
    """What to say if the code of a class is not that of a record; empty if it is, or is installed now."""
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
    if group in _BASES and Path(f"{name}.py").is_file():
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
    """The class of that name among those that SSL3D_PLUGINS names, or None."""
    if group not in _BASES:
        return None
    for spec in filter(None, map(str.strip, os.environ.get(NAMED, "").split(","))):
        if _FILE.fullmatch(spec) is None and _OBJECT.fullmatch(spec) is None:
            raise PluginError(f"{NAMED}: {spec!r} is neither PATH/file.py nor module:Class")
        try:
            found, made = find(group, spec)
        except _NoneOfIt:
            continue  # it is of the other kind
        if found == name:
            return made
    return None


class _NoneOfIt(PluginError):
    """A file or a module has no class of the kind."""


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
    """The class of a module that is meant, checked as far as a run needs it.

    Raises:
        PluginError: There is none, there are several, or it lacks something.
    """
    home, base_name = _BASES[group]
    base = getattr(importlib.import_module(home), base_name)
    own = {
        name: made
        for name, made in vars(module).items()
        if inspect.isclass(made) and issubclass(made, base) and made.__module__ == module.__name__
    }
    there = {name: m for name, m in own.items() if not name.startswith("_") and not inspect.isabstract(m)}
    if wanted is not None:
        made = getattr(module, wanted, None)
        if made is None:
            raise PluginError(
                f"{title}: defines no {wanted} (it has {', '.join(own) or 'no ' + base_name})"
            )
        if not inspect.isclass(made) or not issubclass(made, base):
            raise _NoneOfIt(f"{title}: {wanted} is no subclass of ssl3d.api.{base_name}")
    elif len(there) == 1:
        (made,) = there.values()
    elif there:
        raise PluginError(
            f"{title}: defines {len(there)} classes of the kind, {' and '.join(there)}; name one of them, "
            f"as in {Path(str(module.__file__)).name}:{next(iter(there))}"
        )
    else:
        left = [f"{name} lacks {_unwritten(m)}" for name, m in own.items() if inspect.isabstract(m)]
        why = f" ({'; '.join(left)})" if left else ""
        raise _NoneOfIt(f"{title}: defines no subclass of ssl3d.api.{base_name}{why}")
    lacking = [name for name in _NEEDED[group] if not isinstance(getattr(made, name, None), str)]
    if not dataclasses.is_dataclass(getattr(made, "Config", None)):
        lacking.insert(0, "Config (a dataclass)")
    if inspect.isabstract(made):
        lacking.append(_unwritten(made))
    if lacking:
        raise PluginError(f"{title}: class {made.__name__} lacks {', '.join(lacking)}")
    return made


def _unwritten(made: Any) -> str:
    return ", ".join(sorted(made.__abstractmethods__))


def _own_name(made: Any, stem: str, title: str) -> str:
    name = getattr(made, "name", None)
    if name is None:
        return re.sub(r"\W", "_", stem)
    if not isinstance(name, str) or not re.fullmatch(r"\w+", name):
        raise PluginError(f"{title}: its name is {name!r}, must be letters, digits and underscores")
    return name


def _registered_as(group: str, plugin: type) -> str | None:
    value = f"{plugin.__module__}:{plugin.__qualname__}"
    return next((name for name, point in _installed(group).items() if point.value == value), None)


def _same_as_installed(group: str, name: str, made: Any, content: bytes, title: str) -> Any:
    """The installed plugin of that name, if it is this very text: its author has installed it by now."""
    installed = load(group, name)
    file = Path(inspect.getfile(installed))
    same = installed.__name__ == made.__name__ and content and file.is_file()
    if same and file.read_bytes() == content:
        return installed
    raise PluginError(
        f"{title}: another {_kind(group)} called {name!r} is installed; give the class another `name`, as "
        f'in name = "my_{name}"'
    )
