"""Provenance of stores and runs: a note of how each was made, compared before it counts as done.

Stores and runs outlive a change of the suite, and several folders of records share them: that a file is
there does not say that it is the one that is meant now.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ssl3d.api import (
    Ssl3dError,
    code_digest,
    former_defaults,
    plugins,
    read_yaml,
    write_whole,
)

NOTES = ".made"
"""Folder of the notes, beside what they are about."""

Options = Mapping[str, Sequence[str]]
"""Flag -> its values, as words; under "" what comes before the first flag."""

IDLE = frozenset(
    ["out", "overwrite", "resume", "save-at", "workers", "threads", "accelerator", "device", "devices",
     "nodes", "checkpoint-every", "log-every", "eval-every"]
)  # fmt: skip
"""Flags that change nothing of a product, but where, how fast, and how often it is looked at."""


def options_in(words: Sequence[str], apart: Sequence[str] = ()) -> dict[str, list[str]]:
    """Collect the options of a command, in no order; of one that is given twice, the last.

    Args:
        words: Words after the command's name.
        apart: Flags to leave out, beside those that change nothing.
    """
    options: dict[str, list[str]] = {"": []}
    flag = ""
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word[2:].partition("=")
            flag = flag.replace("_", "-")
            options[flag] = [value] if equals else []
        else:
            options[flag].append(_with_code(word) if flag in ("proxy", "encoder") else word)
    return {key: values for key, values in options.items() if key not in IDLE and key not in apart}


def _with_code(word: str) -> str:
    """Add to a plugin's file the hash of what it computes: another proxy makes another run."""
    path = Path(re.sub(r"(?<=[.]py):\w+$", "", word))
    if path.suffix != ".py" or not path.is_file():
        return word
    try:
        return f"{word} (code {code_digest(path.read_bytes())[:8]})"
    except (SyntaxError, ValueError):
        return word


@dataclass(frozen=True)
class Provenance:
    """Options and sources that a store or a run is made with.

    Attributes:
        path: Store, or folder of the run, which one deletes to have it made anew.
        ways: Options that it may have been made with, computed when its turn comes; the first are those of
            now.
        sources: Stores and runs that it is made of, by name.
        along: Paths that have to be deleted with it, being made with the same options.
    """

    path: Path
    ways: Callable[[], Sequence[Options]]
    sources: Mapping[str, Path] = field(default_factory=dict)
    along: Callable[[], Sequence[Path]] = tuple

    def now(self) -> dict[str, Any]:
        """Return what a note holds if the product is made now."""
        options = {key: list(values) for key, values in self.ways()[0].items()}
        return {"options": options, "sources": {name: _digest(path) for name, path in self.sources.items()}}

    def note(self) -> None:
        """Write down what the product is made with: before it is begun, for it may be stopped and go on.

        Raises:
            OSError: It cannot be written.
        """
        write_whole(_note(self.path), yaml.safe_dump(self.now(), sort_keys=False))

    def difference(self) -> str:
        """Say why what is there is not what would be made now; empty if it is, or if nobody knows."""
        ways, then = self.ways(), _note_of(self.path)
        former = _former_defaults(_read(self.path / "config.yaml"), ways[0])
        if former:
            return self._refusal(f"made with the defaults of an earlier version: {former}")
        if not isinstance(then.get("options"), dict):
            why = _difference_from_config(_read(self.path / "config.yaml"), ways[0])
            return self._refusal(f"made with other options: {why}") if why else ""
        if all(_difference(then["options"], way) for way in ways):
            return self._refusal(f"made with other options: {_difference(then['options'], ways[0])}")
        known = then.get("sources") or {}
        for name, path in self.sources.items():
            # Where a source has no note, nobody knows what it was.
            if known.get(name) and _digest(path) not in ("", known[name]):
                return self._refusal(f"made of another {name} than the one that is there now")
        return ""

    def _refusal(self, why: str) -> str:
        paths = [self.path, *(path for path in self.along() if path.exists())]
        return f"{why}; use another --work, or delete {' '.join(map(str, paths))}"


def _note(path: Path) -> Path:
    return path.parent / NOTES / f"{path.name}.yaml"


def _read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        content = read_yaml(path)
        if isinstance(content, dict):
            return content
    return {}


def _note_of(path: Path) -> dict[str, Any]:
    """Read the note about a store or run; empty where there is none, and for a link to another's."""
    return {} if path.is_symlink() else _read(_note(path))


def _digest(path: Path) -> str:
    """Hash the note about a source; empty if it has none."""
    note = _note_of(path)
    return hashlib.sha256(json.dumps(note, sort_keys=True).encode()).hexdigest()[:16] if note else ""


def _difference(then: Options, now: Options) -> str:
    """Say how two ways differ; empty if they do not."""
    flags = [
        flag
        for flag in dict.fromkeys([*then, *now])
        if flag not in IDLE and not _same(then.get(flag), now.get(flag))
    ]
    if not flags:
        return ""
    return f"{_flags(then, flags)} then, {_flags(now, flags)} now"


def _difference_from_config(config: Mapping[str, Any], now: Options) -> str:
    """Say how a run's own configuration differs from what is asked for, as far as it has it."""
    then: dict[str, list[str]] = {}
    for flag, values in now.items():
        value: Any = config
        for key in flag.replace("-", "_").split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        recorded = value if isinstance(value, list) else [value]
        if value is None or flag in ("init", "preset") or (flag == "encoder" and "init" in now):
            continue  # the architecture is that of the run it began with
        if flag == "data" and not (_phantoms(values) and _phantoms(recorded)):
            continue  # the same data lie in other folders
        if not _agrees(values, recorded):
            then[flag] = [_text(entry) for entry in recorded]
    return f"{_flags(then, list(then))} then, {_flags(now, list(then))} now" if then else ""


def _former_defaults(config: Mapping[str, Any], now: Options) -> str:
    """Say which options of a run's plugins had other defaults when it was made, and how they differ."""
    then: dict[str, list[str]] = {}
    meant: dict[str, Sequence[str]] = {}
    named = {plugins.PROXIES: config.get("proxy") or [], plugins.ENCODERS: [config.get("encoder") or ""]}
    for group, name in ((group, name) for group, names in named.items() for name in names):
        section = config.get(name)
        if not isinstance(section, Mapping):
            continue
        with contextlib.suppress(Ssl3dError):  # the command itself will say so
            former = former_defaults(plugins.load(group, name).Config, section)
            for option, (before, default) in former.items():
                flag = f"{name}.{option}".replace("_", "-")
                given = now.get(flag, [_text(default)])
                if not _agrees(given, [before]):
                    then[flag], meant[flag] = [_text(before)], given
    return f"{_flags(then, list(then))} then, {_flags(meant, list(then))} now" if then else ""


def _phantoms(values: Sequence[Any]) -> bool:
    return bool(values) and all(str(value).startswith("phantoms") for value in values)


def _agrees(given: Sequence[str], recorded: Sequence[Any]) -> bool:
    """Return whether words can mean what a configuration holds."""
    values = [_value(word) for word in given]
    if len(values) == 1 and isinstance(values[0], list):
        values = values[0]
    known = [_value(entry) for entry in recorded]
    if values == known or not values:
        return True
    if len(values) == 1:  # one number for every axis
        return all(values[0] == entry for entry in known)
    return False


def _value(word: Any) -> Any:
    """Read a word as a number, a list or what else it says."""
    if isinstance(word, str):
        with contextlib.suppress(ValueError):
            return float(word)
        with contextlib.suppress(yaml.YAMLError):
            content = yaml.safe_load(word)
            return _value(content) if not isinstance(content, str) else content
    if isinstance(word, list | tuple):
        return [_value(entry) for entry in word]
    return float(word) if isinstance(word, int | float) else word


def _same(then: Sequence[str] | None, now: Sequence[str] | None) -> bool:
    if then is None or now is None:
        return then is now
    return [_value(word) for word in then] == [_value(word) for word in now]


def _text(value: Any) -> str:
    return json.dumps(value).replace(" ", "") if isinstance(value, list | bool) else str(value)


def _flags(options: Options, flags: Sequence[str]) -> str:
    shown = []
    for flag in flags:
        values = options.get(flag)
        if values is None:
            shown.append(f"no --{flag}")
        else:
            shown.append(" ".join([*([f"--{flag}"] if flag else []), *map(str, values)]))
    return ", ".join(shown)
