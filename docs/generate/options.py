"""The options of every command, as its own argument parser has them."""

import contextlib
import io
import re
from typing import NamedTuple
from unittest import mock

from generate.pages import prose
from ssl3d import plugins
from ssl3d.command_help import CommandHelp, OptionHelp


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
    """Leaves a command as soon as it would print its help."""

    def __init__(self, told: CommandHelp) -> None:
        self.told = told


def ask(command: str, *words: str) -> Asked | None:
    """Return what a command's help says; None if it has no options, only a usage."""

    def capture(told: CommandHelp) -> None:
        raise _Captured(told)

    printed = io.StringIO()
    try:
        with mock.patch("ssl3d.config.print_help", capture), contextlib.redirect_stdout(printed):
            plugins.load(plugins.COMMANDS, command).main([*words, "--help-all"])
    except _Captured as captured:
        told = captured.told
        own = [option(entry) for group in told.groups if not group.plugin for entry in group.options]
        theirs = [
            Group(group.plugin, [option(entry) for entry in group.options])
            for group in told.groups
            if group.plugin
        ]
        return Asked(told.summary, told.epilog, [Group("", own), *theirs])
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


def option(told: OptionHelp) -> str:
    """Return one option as a MyST directive, to which pages may link."""
    shown = f"{told.flag} <{told.takes}>" if told.takes else told.flag
    tail = f" Default: `{told.default}`." if told.default else ""
    return f"```{{option}} {shown}\n{prose(told.text)}{tail}\n```\n"
