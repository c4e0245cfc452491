"""Help of the commands: options in sections, the most used first, and types as people say them."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

_WORDS = {int: "whole number", float: "number", str: "text", Path: "path", bool: "true or false"}
_COLUMN = 26  # where the texts begin
_WIDEST = 100


class HelpSection(NamedTuple):
    """Section of a command's help, which the command's dataclass lists in its `help_sections`.

    Attributes:
        title: Title of the section.
        common: Names of the fields that `--help` shows, the most used first.
        rare: Names of the fields that only `--help-all` shows.
    """

    title: str
    common: tuple[str, ...]
    rare: tuple[str, ...] = ()


class OptionHelp(NamedTuple):
    """What the help says of one option.

    Attributes:
        flag: Flag as it is typed, or the name in capitals of an option without a flag.
        takes: Words for what it takes; empty for a flag that stands alone.
        default: Default as it would be typed; empty where there is none to type.
        text: Description of the option.
        rare: Whether only `--help-all` shows it.
    """

    flag: str
    takes: str
    default: str
    text: str
    rare: bool = False


class OptionGroup(NamedTuple):
    """Options that the help shows together.

    Attributes:
        title: Title of the section.
        plugin: Name of the plugin whose options they are; empty for the command's own.
        options: Options in the order of the help.
    """

    title: str
    plugin: str
    options: list[OptionHelp]


class CommandHelp(NamedTuple):
    """What `--help` of a command says.

    Attributes:
        prog: Name of the command, such as `ssl3d pretrain`.
        summary: Sentence on what the command does.
        groups: Options in sections.
        epilog: Text below the options.
        whole: Whether rare options are shown too.
    """

    prog: str
    summary: str
    groups: list[OptionGroup]
    epilog: str
    whole: bool


COMMON = OptionGroup(
    "help, files of options, memory",
    "",
    [
        OptionHelp("--config", "path", "", "YAML file of options, which flags override."),
        OptionHelp(
            "--print_config",
            "",
            "",
            "Print the options that would be used, in the form of such a file, and exit; "
            "=skip_default leaves out those at their defaults, =skip_null those without a value.",
        ),
        OptionHelp(
            "--max-memory",
            "size",
            "",
            "Memory that may be taken at once for scans, volumes and files, such as 8GB; what needs more "
            "is set aside by name. By default $SSL3D_MAX_MEMORY, else half of what is free.",
        ),
        OptionHelp("--help", "", "", "Show this help and exit."),
    ],
)
"""Options that every command takes."""


def help_of(
    prog: str, options: type, configs: Mapping[str, type], epilog: str = "", whole: bool = False
) -> CommandHelp:
    """Collect what the help of a command says.

    Args:
        prog: Name of the command, such as `ssl3d pretrain`.
        options: Dataclass of the command.
        configs: Dataclass of the options of each plugin that is named, by its name.
        epilog: Text below the options.
        whole: Whether rare options are shown too.
    """
    from docstring_parser import parse_from_object

    own = {name: (positional, option) for name, positional, option in _options(options, "")}
    groups = [OptionGroup("arguments", "", [option for positional, option in own.values() if positional])]
    left = {name: option for name, (positional, option) in own.items() if not positional}
    for section in getattr(options, "help_sections", ()):
        listed = [left.pop(name) for name in section.common if name in left]
        listed += [left.pop(name)._replace(rare=True) for name in section.rare if name in left]
        groups.append(OptionGroup(section.title, "", listed))
    several = len(groups) > 1
    groups.append(OptionGroup("more options" if several else "options", "", list(left.values())))
    for name, config in configs.items():
        groups.append(
            OptionGroup(f"options of {name}", name, [entry[2] for entry in _options(config, f"{name}.")])
        )
    described = parse_from_object(options) if options.__doc__ else None
    summary = (options.__doc__ or "").strip().split("\n\n")[0] if described else ""
    return CommandHelp(prog, " ".join(summary.split()), [g for g in groups if g.options], epilog, whole)


def print_help(command: CommandHelp) -> None:
    """Print the help of a command for the width of the terminal."""
    sys.stdout.write(format_help(command, min(shutil.get_terminal_size().columns, _WIDEST)))


def format_help(command: CommandHelp, width: int) -> str:
    """Return the help of a command as text, with lines of at most a number of columns."""
    arguments = [
        option.flag for group in command.groups if group.title == "arguments" for option in group.options
    ]
    lines = [" ".join(["usage:", command.prog, *arguments, "[options]"]), ""]
    lines += [*textwrap.wrap(command.summary, width), ""]
    hidden = 0
    for group in [*command.groups, COMMON]:
        listed = [option for option in group.options if command.whole or not option.rare]
        hidden += len(group.options) - len(listed)
        if listed:
            lines += [f"{group.title}:", *(line for option in listed for line in _lines(option, width)), ""]
    if hidden:
        lines += [*textwrap.wrap(f"{command.prog} --help-all lists {hidden} more options.", width), ""]
    if command.epilog:
        lines += [*textwrap.wrap(" ".join(command.epilog.split()), width), ""]
    return "\n".join(lines)


def describe(hint: Any) -> str:
    """Return in words what an option of a type takes.

    Example:
        >>> describe(tuple[int, ...]), describe(tuple[float, float]), describe(Literal["auto", "cpu"])
        ('whole number ...', '2 numbers', 'auto | cpu')
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " | ".join(str(value) for value in arguments)
    if origin in (tuple, list, Sequence):
        inner = [argument for argument in arguments if argument is not Ellipsis]
        if Ellipsis in arguments or origin is not tuple:
            return f"{describe(inner[0])} ..." if inner else "text ..."
        if len(inner) > 1 and len(set(inner)) == 1 and inner[0] in _WORDS:
            return f"{len(inner)} {_WORDS[inner[0]]}s"
        return " ".join(map(describe, inner))
    if arguments:  # a union
        return " | ".join(describe(argument) for argument in arguments if argument is not type(None))
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def typed(value: Any) -> str:
    """Return a value as it would be typed after a flag; empty where there is none to type.

    Example:
        >>> typed((1, 2)), typed(True), typed(None)
        ('1 2', 'true', '')
    """
    if value is None or value == "" or value == () or value == []:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return " ".join(typed(entry) or '""' for entry in value)
    return str(value)


def field_help(config: type) -> dict[str, str]:
    """Collect the help of the fields, of bases too: the string below each, or its line in `Attributes:`."""
    from docstring_parser import parse_from_object

    help_texts: dict[str, str] = {}
    for base in reversed(config.__mro__):
        if base is object or not dataclasses.is_dataclass(base):
            continue
        try:
            documented = parse_from_object(base)
        except (OSError, SyntaxError):  # defined in a console: no source to read
            continue
        for param in documented.params:
            help_texts[param.arg_name] = " ".join((param.description or "").split())
    return help_texts


def _options(config: type, prefix: str) -> Iterator[tuple[str, bool, OptionHelp]]:
    """Yield name, whether it stands without a flag, and help of each field of a dataclass."""
    hints, texts = typing.get_type_hints(config), field_help(config)
    choices = getattr(config, "choices", {})
    for field in dataclasses.fields(config):
        if not field.init:
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        shown = "" if default is dataclasses.MISSING or default is False else typed(default)
        hint, text = hints[field.name], texts.get(field.name, "")
        if field.metadata.get("positional"):
            several = typing.get_origin(hint) in (tuple, list)
            yield (
                field.name,
                True,
                OptionHelp(field.name.upper() + (" ..." if several else ""), "", shown, text),
            )
            continue
        takes = " | ".join(choices[field.name]) if field.name in choices else describe(hint)
        if hint is bool and default is False:
            takes = ""
        yield field.name, False, OptionHelp(f"--{prefix}{field.name.replace('_', '-')}", takes, shown, text)


def _lines(option: OptionHelp, width: int) -> list[str]:
    takes = f" <{option.takes}>" if option.takes else ""
    head = f"  {option.flag}{takes}"
    text = option.text + (f" (default: {option.default})" if option.default else "")
    body = textwrap.wrap(text, max(width - _COLUMN, 30))
    if len(head) + 2 <= _COLUMN and body:
        return [head.ljust(_COLUMN) + body[0], *(" " * _COLUMN + line for line in body[1:])]
    return [
        *textwrap.wrap(head.strip(), width, initial_indent="  ", subsequent_indent="      "),
        *(" " * _COLUMN + line for line in body),
    ]
