"""Flags, YAML and help of dataclasses, by jsonargparse; every error is one line that names the flag."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import itertools
import json
import numbers
import re
import reprlib
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ssl3d import memory
from ssl3d.command_help import help_of, print_help
from ssl3d.errors import PluginError, UsageError

RENAMED = {"accelerator": "device"}
"""Former names of options, which flags, files and keyword arguments may still use."""
_MEANT = {("device", "gpu"): "cuda"}  # what a value says in other toolkits


@dataclasses.dataclass(frozen=True)
class Plugins:
    """Options whose values are plugin names; each plugin named gets a section of its own.

    Attributes:
        options: Function that returns the `Config` dataclass of a name (and raises a `PluginError` for an
            unknown one), for each field of the command's dataclass that holds names of plugins.
        known: Names that may be sections, for each option; they tell a section from a typing error.
        strict: Whether a flag of a plugin that no option selects is an error.
        called: Function that returns the name of a plugin, and so of its section, from the option's value,
            for each option whose values are not the names themselves.
        silent: Configuration files that are meant to hold sections of plugins that nobody selects.
    """

    options: Mapping[str, Callable[[str], type]] = dataclasses.field(default_factory=dict)
    known: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    strict: bool = True
    called: Mapping[str, Callable[[str], str]] = dataclasses.field(default_factory=dict)
    silent: Sequence[str] = ()

    def name(self, option: str, said: str) -> str:
        """Return the name of the plugin that an option's value means."""
        return self.called[option](said) if option in self.called else said


@dataclasses.dataclass
class Parsed:
    """Parsed command line: options, sections of plugins, and what the user set.

    Attributes:
        options: Instance of the command's dataclass.
        sections: Instance of its `Config`, for every plugin that an option selects, by name.
        given: Names of the options set by a flag or a configuration file, not by default; those of a
            section as NAME.FIELD.
    """

    options: Any
    sections: dict[str, Any]
    given: set[str]


def parse(
    prog: str, options: type, argv: Sequence[str], plugins: Plugins | None = None, epilog: str = ""
) -> Parsed:
    """Parse a command line into dataclasses.

    Flags are the fields' names with dashes (underscores work too), sections are `--name.field`, tuples
    and lists take several words, `--config FILE.yaml` comes below the flags whatever its place,
    `--print_config` prints what would be used, `--help` the options that are used most, and `--help-all`
    all of them. Fields with metadata `positional=True` are positional.

    Args:
        prog: Name of the command, such as `ssl3d pretrain`.
        options: Dataclass of the command, whose field docstrings (or `Attributes:`) become the help.
        argv: Words after the command.
        plugins: Options that name plugins.
        epilog: Text below the help.

    Raises:
        UsageError: A flag is unknown or its value unusable; the message names the flag.
    """
    plugins = plugins or Plugins()
    argv, asked = without_print_config(_equals_apart(argv))
    argv = _today(options, _with_memory(argv))
    help_words = {"-h", "--help", "--help-all"} & set(argv)
    config_files = [path for word, path in itertools.pairwise(argv) if word == "--config"]
    contents = {path: todays(options, _read_yaml(path)) for path in config_files if path[:2] != "--"}
    selected = _select(options, plugins, argv, list(contents.values()), by_default=not help_words)
    if "--help-all" in help_words:
        selected = _select(options, plugins, argv, list(contents.values()))
    configs = {name: plugins.options[option](said) for name, (option, said) in selected.items()}
    if help_words:
        print_help(help_of(prog, options, configs, epilog, "--help-all" in help_words))
        raise SystemExit(0)
    for path, content in contents.items():
        _check_names(prog, path, content, options, configs, plugins)
    parser, defaults = _parser(prog, options, configs)
    argv = _normalize(argv, options, configs, contents)
    parser._prog_name = prog
    try:
        namespace = parser.parse_args(argv)
    except UsageError as error:
        raise UsageError(_placed(prog, str(error), argv, contents)) from error
    except Exception as error:  # jsonargparse lets some type errors through
        raise UsageError(f"{prog}: {_one_line(error)}") from error
    values = {key: value for key, value in namespace.as_dict().items() if key not in ("config",)}
    chosen = _chosen(options, plugins, values)
    for word in argv:
        section = re.match(r"--(\w+)\.", word)
        if plugins.strict and section and section[1] in selected and section[1] not in chosen:
            option = selected[section[1]][0]
            raise UsageError(
                f"{prog}: {word.split('=')[0]}: {section[1]} is not selected; name it with --{option}"
            )
    given = {
        field.name
        for field in dataclasses.fields(options)
        if _is_given("", field.name, argv, contents.values()) or field.metadata.get("positional")
    }
    for name, config in configs.items():
        own = {field.name for field in dataclasses.fields(config)} if name in chosen else set()
        given |= {f"{name}.{field}" for field in own if _is_given(name, field, argv, contents.values())}
    sections = {
        name: _build(prog, f"{name}.", config, values.get(name) or {}, defaults[name])
        for name, config in configs.items()
        if name in chosen
    }
    for path in set(contents) - set(plugins.silent):
        for name in sorted(set(contents[path]) & _sections(plugins) - chosen):
            print(f"{prog}: {path}: {name} is not selected, so its section is not used", file=sys.stderr)
    positional = {f.name for f in dataclasses.fields(options) if f.metadata.get("positional")}
    given_values = {
        key: values[key] for key in (f.name for f in dataclasses.fields(options)) if key in values
    }
    given_values = {
        key: value
        for key, value in given_values.items()
        if key not in positional or value not in (None, [])
    }
    parsed = Parsed(_build(prog, "", options, given_values, defaults[""]), sections, given)
    if asked is not None:
        sections_used = {name: to_dict(section) for name, section in parsed.sections.items()}
        print_config(to_dict(parsed.options) | sections_used, options, configs, asked)
        raise SystemExit(0)
    return parsed


def without_print_config(argv: Sequence[str]) -> tuple[list[str], set[str] | None]:
    """Take `--print_config[=WORDS]` out of a command line.

    Returns:
        Other words, and the words of the flag (skip_default, skip_null); None where it is not there.

    Raises:
        UsageError: The flag has another word.
    """
    words = _equals_apart(argv)
    rest: list[str] = []
    asked: set[str] | None = None
    while words:
        word = words.pop(0)
        if word not in ("--print_config", "--print-config"):
            rest.append(word)
            continue
        asked = set()
        if words and set(words[0].split(",")) <= {"skip_default", "skip_null", "comments"}:
            asked = set(words.pop(0).split(","))
    return rest, asked


def _with_memory(argv: Sequence[str]) -> list[str]:
    """Take `--max-memory` out of a command line, and set the budget; it is no option of what is made."""
    words: list[str] = []
    left = list(argv)
    while left:
        word = left.pop(0)
        if word.replace("_", "-") != memory.FLAG:
            words.append(word)
        elif not left or left[0].startswith("--"):
            raise UsageError(f"{memory.FLAG}: name a number of bytes after it, such as 8GB")
        else:
            memory.allow(left.pop(0))
    return words


def print_config(
    values: Mapping[str, Any], options: type, configs: Mapping[str, type], words: set[str]
) -> None:
    """Print options as a file that `--config` reads back.

    Args:
        values: Plain values of the options, and of the sections by the names of their plugins.
        options: Dataclass of the command.
        configs: Dataclass of each section.
        words: `skip_default` leaves out what is at its default, `skip_null` what has no value.
    """
    from ssl3d.yaml_files import dump_yaml

    def kept(config: type, own: Mapping[str, Any]) -> dict[str, Any]:
        defaults = _defaults(config) if "skip_default" in words else {}
        return {
            key: value
            for key, value in own.items()
            if not (key in defaults and defaults[key] == value)
            and not ("skip_null" in words and value is None)
        }

    printed = kept(options, {key: value for key, value in values.items() if key not in configs})
    for name in configs:
        own = values.get(name, {})
        section = kept(configs[name], own)
        if section:
            # Without these the file would look as if an earlier version had written it.
            printed[name] = section | {key: own[key] for key in as_before(configs[name]) if key in own}
    sys.stdout.write(dump_yaml(printed))


def _defaults(config: type) -> dict[str, Any]:
    """Return the plain default of each field that has one."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        if field.default_factory is not dataclasses.MISSING:
            values[field.name] = _plain(field.default_factory())
        elif field.default is not dataclasses.MISSING:
            values[field.name] = _plain(field.default)
    return values


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a dataclass to plain values that YAML and JSON hold; tuples become lists, paths strings."""
    return {key: _plain(value) for key, value in dataclasses.asdict(config).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


_BEFORE = "before"
_ONLY = "only"


def added_option(default: Any, before: Any, only: Mapping[str, Any] | None = None) -> Any:
    """Declare an option that was added to a dataclass later, for its default means something new.

    Args:
        default: Value where the user gives none.
        before: Value that files mean which were written before there was the option.
        only: Values of other options with which alone it has an effect.

    Example:
        >>> @dataclasses.dataclass
        ... class Options:
        ...     rings: str = added_option("published", before="none")
        >>> from_dict(Options, {}, "here").rings, from_dict(Options, {}, "a run", recorded=True).rings
        ('published', 'none')
    """
    return dataclasses.field(default=default, metadata={_BEFORE: before, _ONLY: dict(only or {})})


def as_before(config: type) -> dict[str, Any]:
    """Collect the values that files mean which were written before there were these options."""
    fields = dataclasses.fields(config)
    return {field.name: field.metadata[_BEFORE] for field in fields if _BEFORE in field.metadata}


def former_defaults(config: type, recorded: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Compare the defaults that an earlier version made something with to those of now.

    Args:
        config: The dataclass.
        recorded: Options that the earlier version wrote down, all that there were.

    Returns:
        (default then, default now) of each option that has come since, where it has an effect.
    """
    return {
        field.name: (field.metadata[_BEFORE], field.default)
        for field in dataclasses.fields(config)
        if _BEFORE in field.metadata
        and field.name not in recorded
        and field.metadata[_BEFORE] != field.default
        and all(recorded.get(name) == value for name, value in field.metadata[_ONLY].items())
    }


def from_dict(config: type, values: Mapping[str, Any], where: str, recorded: bool = False) -> Any:
    """Build a dataclass from what `to_dict` returned; types are restored, unknown keys refused.

    Args:
        config: The dataclass.
        values: Options by name.
        where: Beginning of the message of an error.
        recorded: Whether ssl3d wrote the values, all that there were: an option that is missing was
            added since, and means what it meant before (see `added_option`).

    Raises:
        UsageError: There are no options by name, a key is unknown or a value unusable; the message starts
            with `where`.
    """
    if not isinstance(values, Mapping):
        raise UsageError(f"{where}: {reprlib.repr(values)}; expected options by name")
    values = todays(config, values)
    names = {field.name for field in dataclasses.fields(config)}
    unknown = sorted(map(str, set(values) - names))
    if unknown:
        raise UsageError(f"{where}: unknown option {', '.join(unknown)}; known: {', '.join(sorted(names))}")
    hints = typing.get_type_hints(config)
    fields = {}
    try:
        for key, given in values.items():
            try:
                value = fields[key] = _tuples(hints[key], given)
            except OverflowError as error:
                raise ValueError(f"{key}: {error}") from error
            if not _fits(hints[key], value):
                raise ValueError(f"{key} is {reprlib.repr(value)}; {_wanted(hints[key])}")
        return config(**((as_before(config) if recorded else {}) | fields))
    except (ValueError, TypeError) as error:
        raise UsageError(f"{where}: {_one_line(error)}") from error


def _wanted(hint: Any) -> str:
    """Say what a type takes."""
    if typing.get_origin(hint) is typing.Literal:
        return f"choose {', '.join(map(str, typing.get_args(hint)))}"
    return f"expected {getattr(hint, '__name__', str(hint).replace('typing.', ''))}"


def todays(options: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Bring former names of options, and values that other toolkits use, to those of today.

    Args:
        options: Dataclass of the options.
        values: Values by the names of options; other names are left as they are.
    """
    fields = {field.name for field in dataclasses.fields(options)}
    named = {
        RENAMED[key] if key not in fields and RENAMED.get(key) in fields else key: value
        for key, value in values.items()
    }
    return {
        key: _MEANT.get((key, value), value) if isinstance(value, str) and key in fields else value
        for key, value in named.items()
    }


def _today(options: type, argv: Sequence[str]) -> list[str]:
    """Bring the flags of a command line to the names and values of today."""
    words: list[str] = []
    for word in argv:
        before = words[-1][2:].replace("-", "_") if words and words[-1].startswith("--") else ""
        if word.startswith("--"):
            (name,) = todays(options, {word[2:].replace("-", "_"): None})
            words.append(f"--{name.replace('_', '-')}" if name != word[2:].replace("-", "_") else word)
        else:
            words.append(todays(options, {before: word})[before])
    return words


_BARE = (bool, bool | None)  # a bare flag is true, so another word after it is not its value
_TRUTH = ("true", "false", "yes", "no", "null", "none")


# Parsing ------------------------------------------------------------------------------------------


def _nearest(name: str, known: Sequence[str]) -> str:
    """Suggest what may have been meant by an unknown flag or name, or where all are listed."""
    section, dot, field = name.partition(".")
    own = [entry.partition(".")[2] for entry in known if dot and entry.startswith(f"{section}.")]
    if own:
        close = difflib.get_close_matches(field, own)
        if close:
            return f"; near it: {section}.{close[0]}"
        return f"; {section.removeprefix('--')} has {', '.join(own)}"
    close = difflib.get_close_matches(name, known, cutoff=0.75)
    return f"; near it: {', '.join(close)}" if close else "; --help lists the options"


def _placed(prog: str, line: str, argv: Sequence[str], contents: Mapping[str, Mapping[str, Any]]) -> str:
    """Name the configuration file in an error about a value that no flag gave."""
    match = re.match(rf"{prog}: --([\w.-]+): (.*)", line)
    if match is None:
        return line
    section, _, field = match[1].replace("-", "_").rpartition(".")
    if not _is_given(section, field, argv, ()):
        for path, content in reversed(list(contents.items())):
            if _is_given(section, field, (), (content,)):
                return f"{prog}: {path}: {match[1].replace('-', '_')}: {match[2]}"
    return line


def _check_names(
    prog: str,
    path: str,
    content: Mapping[str, Any],
    options: type,
    configs: Mapping[str, type],
    plugins: Plugins,
) -> None:
    """Refuse a name in a configuration file that is no option.

    Raises:
        UsageError: There is one; the message names the file, and what is near.
    """
    own = {field.name for field in dataclasses.fields(options)}
    sections = {name: [field.name for field in dataclasses.fields(kind)] for name, kind in configs.items()}
    others = _sections(plugins) - set(sections)
    known = [
        *own,
        *sections,
        *others,
        *(f"{name}.{field}" for name in sections for field in sections[name]),
    ]
    for key, value in content.items():
        inside = isinstance(value, dict) and key in sections
        for name in [f"{key}.{field}" for field in value] if inside else [str(key)]:
            if name.replace("-", "_") not in known and name.partition(".")[0] not in others | {"config"}:
                raise UsageError(f"{prog}: {path}: unknown option {name}{_nearest(name, known)}")


def _parser(prog: str, options: type, configs: Mapping[str, type]) -> tuple[Any, dict[str, dict[str, Any]]]:
    from jsonargparse import ArgumentParser

    class OneLineParser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            line = _one_line(message)
            before, unknown, words = line.partition("unrecognized arguments: ")
            if unknown and not before:
                line += _nearest(words.split("=")[0].split()[0], list(self._option_string_actions))
            raise UsageError(f"{prog}: {line}") from ex

    # A mistyped flag must not become another one.
    parser = OneLineParser(prog=prog, default_env=False, allow_abbrev=False)
    parser.add_argument("--config", action="config")
    defaults = {"": _add_fields(parser, options, "")}
    for name, config in configs.items():
        defaults[name] = _add_fields(parser, config, f"{name}.")
    return parser, defaults


def _add_fields(parser: Any, config: type, prefix: str) -> dict[str, Any]:
    """Add one flag per field, and return the defaults."""
    hints = typing.get_type_hints(config)
    defaults = {}
    for field in dataclasses.fields(config):
        if not field.init:
            continue
        missing = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if not missing:
            defaults[field.name] = default
        extra = {"default": None if missing else default}
        if field.metadata.get("positional"):
            several = _is_sequence(hints[field.name])
            word = {"nargs": "*" if not missing else "+"} if several else {}
            if not several and not missing:
                word = {"nargs": "?"}
            kind = _item(hints[field.name]) if several else hints[field.name]
            # jsonargparse wants no default here; `parse` leaves out what was not given.
            parser.add_argument(field.name, type=kind, **word)
        else:
            flag = f"--{prefix}{field.name.replace('_', '-')}"
            parser.add_argument(flag, type=hints[field.name], required=missing, **extra)
    return defaults


def _build(
    prog: str, prefix: str, config: type, values: Mapping[str, Any], defaults: Mapping[str, Any]
) -> Any:
    hints = typing.get_type_hints(config)
    fields = {key: _tuples(hints[key], value) for key, value in values.items() if key in hints}
    # A default of None stands for "required": jsonargparse has reported it missing by now.
    fields = {k: v for k, v in fields.items() if v is not None or k in defaults}
    try:
        return config(**fields)
    except (ValueError, TypeError) as error:
        message = _one_line(error)
        names = sorted((f.name for f in dataclasses.fields(config)), key=len, reverse=True)
        culprit = next((n for n in names if re.search(rf"\b{n}\b", message)), None)
        if culprit is None:
            raise UsageError(f"{prog}: {message}") from error
        flag = f"--{prefix}{culprit.replace('_', '-')}"
        said = re.fullmatch(rf"{culprit}(:| is\b)(.*)", message)
        # "lr is 0" becomes "--lr is 0"; a message that begins otherwise is told whole.
        raise UsageError(f"{prog}: {flag}{said[1] + said[2] if said else f': {message}'}") from error


def _select(
    options: type,
    plugins: Plugins,
    argv: Sequence[str],
    files: Sequence[Mapping[str, Any]],
    by_default: bool = True,
) -> dict[str, tuple[str, str]]:
    """Find the plugins named by a flag, by a configuration file or by a section.

    Returns:
        Option, and the words that name the plugin there, for each plugin by name.
    """
    selected: dict[str, tuple[str, str]] = {}
    for option in plugins.options:
        default = next(f for f in dataclasses.fields(options) if f.name == option).default
        named = _values(argv, option)
        if not named:
            named = next((_listed(file[option]) for file in reversed(files) if option in file), [])
        if not named and by_default and default is not dataclasses.MISSING:
            named = _listed(default)
        for said in named:
            selected[plugins.name(option, said)] = option, said
        for said in (word for file in files for word in _listed(file.get(option))):
            # Named in a file, and not above it: its section there is no error.
            with contextlib.suppress(PluginError):
                selected.setdefault(plugins.name(option, said), (option, said))
        known = set(plugins.known.get(option, ()))
        prefixes = {word[2:].split(".")[0].split("=")[0] for word in argv if re.match(r"--\w+\.", word)}
        keys = {key for file in files for key in file}
        for name in sorted(known & (prefixes | keys)):
            selected.setdefault(name, (option, name))
    return selected


def _sections(plugins: Plugins) -> set[str]:
    """Return the names that may be sections of a configuration file."""
    return {name for names in plugins.known.values() for name in names}


def _chosen(options: type, plugins: Plugins, values: Mapping[str, Any]) -> set[str]:
    return {
        plugins.name(option, said) for option in plugins.options for said in _listed(values.get(option))
    }


def _listed(value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    return [str(item) for item in value]


def _normalize(
    argv: Sequence[str],
    options: type,
    configs: Mapping[str, type],
    contents: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    """Put --config first, make one list of a sequence option's words, and write `_` and `-` as one."""
    hints = {("", f.name): typing.get_type_hints(options)[f.name] for f in dataclasses.fields(options)}
    for name, config in configs.items():
        own = typing.get_type_hints(config)
        hints.update({(name, f.name): own[f.name] for f in dataclasses.fields(config)})
    first, rest = [], []
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            rest.append(word)
            continue
        section, _, field = word[2:].rpartition(".")
        field = field.replace("-", "_")
        if (section, field) == ("", "config"):
            if not words or words[0].startswith("--"):
                raise UsageError("--config: names no file; give one after it")
            # As text, not as a path: a lone word for a list option is made a list on the way.
            first += ["--config", _normal_yaml(contents[words.pop(0)], hints, configs)]
            continue
        flag = f"--{section + '.' if section else ''}{field.replace('_', '-')}"
        hint = hints.get((section, field))
        values = []
        if hint is not None and _is_sequence(hint):
            while words and not re.match(r"--\w", words[0]):
                values.append(words.pop(0))
            single = values[0] if len(values) == 1 else ""
            listed = single if single.startswith("[") else None
            if single in ("null", "None") and type(None) in typing.get_args(hint):
                listed = "null"
            if listed is None:
                quote = _item(hint) in (str, Path) or str in typing.get_args(_item(hint))
                items = [json.dumps(v) if quote else v for v in values]
                listed = f"[{', '.join(items)}]"
                if isinstance(hint, types.UnionType | typing._UnionGenericAlias):  # type: ignore[attr-defined]
                    scalars = [a for a in typing.get_args(hint) if not _is_sequence(a)]
                    if single and any(a not in (type(None),) for a in scalars):
                        listed = single if not _numeric_sequence(hint, single) else listed
            rest.append(f"{flag}={listed}")
        elif (
            words and not re.match(r"--\w", words[0]) and (hint not in _BARE or words[0].lower() in _TRUTH)
        ):
            rest.append(f"{flag}={words.pop(0)}")
        elif hint in _BARE:
            rest.append(f"{flag}=true")
        else:
            rest.append(flag)
    return first + rest


def _normal_yaml(
    content: Mapping[str, Any],
    hints: Mapping[tuple[str, str], Any],
    configs: Mapping[str, type],
) -> str:
    """Write a configuration file as JSON, with single values of sequence options wrapped into lists.

    A section that names every option but some that were added later was written out by an earlier
    version (a run's `config.yaml`, `--print_config`): those it lacks mean what they meant then.
    """

    def fold(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
        folded: dict[str, Any] = {}
        for key, value in values.items():
            name = key.replace("-", "_")
            hint = hints.get((section, name))
            if not section and isinstance(value, dict) and hint is None:
                folded[key] = fold(key, value)
            elif hint is not None and value is not None and _is_sequence(hint):
                only = typing.get_origin(hint) in (tuple, list)
                folded[name] = [value] if only and not isinstance(value, list) else value
            else:
                folded[name] = value
        return folded

    folded = fold("", content)
    for name, config in configs.items():
        section, added = folded.get(name), as_before(config)
        others = {field.name for field in dataclasses.fields(config)} - set(added)
        if isinstance(section, dict) and others <= set(section):
            folded[name] = added | section
    return json.dumps(folded)


def _numeric_sequence(hint: Any, word: str) -> bool:
    """Tell whether one word is a one-element sequence rather than the other member of the union."""
    if not re.fullmatch(r"-?\d+(\.\d+)?([eE]-?\d+)?", word):
        return False
    return not any(a in (int, float) for a in typing.get_args(hint))


def _equals_apart(argv: Sequence[str]) -> list[str]:
    words: list[str] = []
    for word in argv:
        match = re.match(r"(--[\w.\-]+)=(.*)", word, re.DOTALL)
        words += [match[1], match[2]] if match else [word]
    return words


def _values(argv: Sequence[str], name: str) -> list[str]:
    """Collect the words after `--name`, at its last occurrence."""
    collected: list[str] = []
    flags = {f"--{name}", f"--{name.replace('_', '-')}"}
    for i, word in enumerate(argv):
        if word in flags:
            words = []
            for follower in argv[i + 1 :]:
                if follower.startswith("--"):
                    break
                words += [w.strip(" '\"") for w in follower.strip("[]").split(",")]
            collected = words
    return [word for word in collected if word]


def _is_given(section: str, field: str, argv: Sequence[str], files: Iterable[Mapping[str, Any]]) -> bool:
    flag = f"--{section + '.' if section else ''}{field.replace('_', '-')}"
    if any(word == flag or word.startswith(f"{flag}=") for word in argv):
        return True
    for content in files:
        inside = content.get(section) if section else content
        if isinstance(inside, dict) and field in inside:
            return True
        if section and f"{section}.{field}" in content:
            return True
    return False


def _read_yaml(path: str) -> dict[str, Any]:
    from ssl3d.yaml_files import read_yaml

    try:
        content = read_yaml(Path(path))
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"--config {path}: not YAML: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise UsageError(f"--config {path}: holds no options (expected `name: value` lines)")
    return {str(key): value for key, value in content.items()}


def _is_sequence(hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_is_sequence(arg) for arg in typing.get_args(hint))
    return origin in (tuple, list, Sequence) or hint in (tuple, list)


def _item(hint: Any) -> Any:
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return next(_item(arg) for arg in typing.get_args(hint) if _is_sequence(arg))
    arguments = typing.get_args(hint)
    return arguments[0] if arguments else str


def _tuples(hint: Any, value: Any) -> Any:
    """Turn lists back to tuples, whole numbers to floats and text to paths, as the dataclass says."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        for arg in typing.get_args(hint):
            if isinstance(value, list) and _is_sequence(arg):
                return _tuples(arg, value)
            if arg is float and isinstance(value, int) and not isinstance(value, bool):
                return float(value) if int not in typing.get_args(hint) else value
            if arg is Path and isinstance(value, str) and str not in typing.get_args(hint):
                return Path(value)
        return value
    if isinstance(value, list | tuple) and origin in (tuple, list):
        inner = typing.get_args(hint)
        items = [_tuples(inner[0] if inner else Any, item) for item in value]
        return tuple(items) if origin is tuple else items
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    return value


def _fits(hint: Any, value: Any) -> bool:
    """Tell whether a value is of the kind that a hint names; what is no plain kind fits anything."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(arg, value) for arg in inner)
    if origin is typing.Literal:
        return any(value == choice and type(value) is type(choice) for choice in inner)
    if origin in (tuple, list):
        if not isinstance(value, tuple | list):
            return False
        each = inner[:1] * len(value) if origin is list or inner[1:] == (Ellipsis,) else inner
        return len(each) == len(value) and all(map(_fits, each, value))
    if origin in (dict, Mapping):
        return isinstance(value, Mapping)
    if hint is None or hint is types.NoneType:
        return value is None
    if hint in (int, float):
        return isinstance(value, numbers.Integral if hint is int else numbers.Real)
    if hint in (str, Path):
        return isinstance(value, str | Path)
    return hint is not bool or isinstance(value, bool)


_PLAIN = {
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "bool": "true or false",
    "NoneType": "null",
}


def _one_line(message: object) -> str:
    """Join the lines of an error, and drop jsonargparse's preambles."""
    text = " ".join(str(message).split())
    text = re.sub(r"^(Parser|Validation) (error|failed): ?", "", text)
    text = re.sub(r'Parser key "([\w.]+)": ', lambda m: f"--{m[1].replace('_', '-')}: ", text)
    several = re.match(r"(--[\w.-]+): Does not validate against any of the Union subtypes", text)
    if several:
        # jsonargparse tells why each type of the union was not met; the type and the value say enough.
        kinds = re.search(r"Subtypes: \[(.*?)\] Errors:", text)
        value = re.search(r"Given value: (.*)$", text)
        wanted = re.sub(r"typing\.Literal\[(.*?)\]", r"\1", kinds[1]) if kinds else "another type"
        text = f"{several[1]}: expected one of {wanted}, got {value[1] if value else 'something else'}"
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", lambda m: _PLAIN.get(m[1], m[1]), text)
    text = text.replace("Expected a ", "expected ").replace(". Got value: ", ", got ")
    return text[:600]


def print_table(rows: Sequence[Sequence[object]], header: Sequence[str]) -> None:
    """Print a table in aligned columns, numbers to the right.

    Example:
        >>> print_table([["simclr", 0.91], ["mae", 0.5]], ["proxy", "score"])
        proxy   score
        ------  -----
        simclr   0.91
        mae       0.5
    """
    table = [list(header), *[[str(cell) for cell in row] for row in rows]]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    numeric = [all(re.fullmatch(r"[-+±.,\d%e ]*", row[i]) for row in table[1:]) for i in range(len(header))]
    for n, row in enumerate(table):
        cells = [
            cell.rjust(w) if right else cell.ljust(w)
            for cell, w, right in zip(row, widths, numeric, strict=True)
        ]
        print("  ".join(cells).rstrip())
        if n == 0:
            print("  ".join("-" * w for w in widths))
    sys.stdout.flush()


def triples(config: type, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Repeat single numbers along D, H and W, in fields for a configuration, where it wants three."""
    hints = typing.get_type_hints(config)
    return {
        key: [value] * 3 if type(value) is int and hints.get(key) == tuple[int, int, int] else value
        for key, value in fields.items()
    }
