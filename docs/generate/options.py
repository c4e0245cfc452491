"""The options of every command, as its own argument parser has them."""

import contextlib
import io
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

import jsonargparse

from generate.pages import prose
from ssl3d import plugins

_WORDS = {int: "whole number", float: "number", str: "text", Path: "path", bool: "true or false"}


class Group(NamedTuple):
    """Options that belong together.

    Attributes:
        plugin: Name of the plugin whose section they are; empty for the command's own.
        lines: Each option as MyST.
    """

    plugin: str
    lines: list[str]


class Asked(NamedTuple):
    """What `--help` of a command would print.

    Attributes:
        summary: What the command does, in a sentence.
        epilog: What stands below the options.
        groups: Options.
    """

    summary: str
    epilog: str
    groups: list[Group]


class _Captured(BaseException):
    """Leaves a command as soon as its parser would print the help."""

    def __init__(self, parser: jsonargparse.ArgumentParser) -> None:
        self.parser = parser


def ask(command: str, *words: str) -> Asked | None:
    """Return what a command's help says, from its parser; None if it has no options, only a usage."""

    def capture(parser: jsonargparse.ArgumentParser, *_: Any) -> None:
        raise _Captured(parser)

    printed = io.StringIO()
    try:
        with (
            mock.patch.object(jsonargparse.ArgumentParser, "print_help", capture),
            contextlib.redirect_stdout(printed),
        ):
            plugins.load(plugins.COMMANDS, command).main([*words, "--help"])
    except _Captured as captured:
        parser = captured.parser
        program = f"ssl3d {command}"
        groups = [Group(name, lines) for name, lines in _groups(parser, program)]
        return Asked(str(parser.description or ""), str(parser.epilog or ""), groups)
    return None


def usage(command: str) -> str:
    """Return what a command with subcommands prints for `--help`."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        plugins.load(plugins.COMMANDS, command).main(["--help"])
    return printed.getvalue()


def subcommands(command: str) -> list[str]:
    """Return the first words that a command takes, of a usage such as `{run,report}`; empty if none."""
    listed = re.search(r"\{([\w,-]+)\}", usage(command))
    return listed[1].split(",") if listed else []


def option(flag: str, hint: Any, default: str, text: str) -> str:
    """Return one option as a MyST directive, to which pages may link."""
    shown = f"{flag} <{describe(hint)}>" if hint is not None else flag
    body = prose(text.strip() or "")
    tail = f" Default: `{default}`." if default else ""
    return f"```{{option}} {shown}\n{body}{tail}\n```\n"


def describe(hint: Any) -> str:
    """Return in words what an option of a type takes."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " | ".join(str(value) for value in arguments)
    if origin in (tuple, list, Sequence):
        inner = [one for one in arguments if one is not Ellipsis]
        if Ellipsis in arguments or origin is not tuple:
            return f"{describe(inner[0])} ..." if inner else "text ..."
        return " ".join(describe(one) for one in inner)
    if arguments:  # a union
        return " | ".join(describe(one) for one in arguments if one is not type(None))
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def shown(value: Any) -> str:
    """Return a default as it would be typed; empty where there is none to type."""
    if value is None or value == "" or value == () or value == []:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return " ".join(shown(one) or '""' for one in value)
    return str(value)


def _groups(parser: jsonargparse.ArgumentParser, program: str) -> Iterator[tuple[str, list[str]]]:
    positional, own = [], []
    for group in parser._action_groups:
        section = re.fullmatch(r"options of (\w+)", str(group.title))
        lines = own if section is None else []
        for action in group._group_actions:
            if action.dest in ("help", "config", "print_config") or action.help == "==SUPPRESS==":
                continue
            hint = getattr(action, "_typehint", None) or action.type or str
            if action.option_strings:
                flag = max(action.option_strings, key=len)
                lines.append(option(flag, hint, shown(action.default), str(action.help or "")))
            else:
                several = action.nargs in ("*", "+")
                name = action.dest.upper() + (" ..." if several else "")
                positional.append(option(name, None, "", str(action.help or "")))
        if section is not None:
            yield section[1], lines
    yield "", positional + own
