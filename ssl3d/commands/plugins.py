"""`ssl3d proxies` and `ssl3d encoders`: what is installed, one line and the paper each."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ssl3d import plugins


@dataclass
class ListOptions:
    """List what is installed, with a sentence and the paper for each.

    Attributes:
        which: Names of plugins, files (PATH/file.py) or module:Class; all that is installed if left out.
    """

    which: tuple[str, ...] = field(default=(), metadata={"positional": True})


@dataclass(frozen=True)
class Listing:
    """Command that lists the plugins of a group.

    Attributes:
        group: Entry-point group of the plugins.
        word: Name of the command.
        summary: Line for `ssl3d --help`.
    """

    group: str
    word: str
    summary: str

    def main(self, argv: Sequence[str]) -> int:
        """Print the list, with the error of one that does not import and then status 1.

        Raises:
            PluginError: A plugin that was named is not there, or does not import.
        """
        from ssl3d.config import parse

        options = parse(f"ssl3d {self.word}", ListOptions, argv, epilog=_EPILOG).options
        failed = 0
        for name in options.which or plugins.names(self.group):
            try:
                name, plugin = plugins.find(self.group, name)
                text = describe(plugin)
            except plugins.PluginError as error:
                if options.which:
                    raise
                text, failed = f"broken: {error}", failed + 1
            print(name)
            print(textwrap.fill(" ".join(text.split("\n")[0].split()), 100, **_INDENT))
            for line in text.split("\n")[1:]:
                print(textwrap.fill(line, 100, **_INDENT))
        if not options.which and not plugins.names(self.group):
            print(f"none installed (entry points {self.group})")
        return 1 if failed else 0


def describe(plugin: Any) -> str:
    """Return the first sentence of a plugin's docstring, and its paper on a second line."""
    documented = inspect.cleandoc(plugin.__doc__ or "no description").split("\n\n")[0]
    paper = getattr(plugin, "paper", "") or "no paper"
    return f"{' '.join(documented.split())}\n{' '.join(str(paper).split())}"


_EPILOG = (
    "Names are those of plugins in installed packages (pip install -e .). Any other plugin is named by its "
    "file or module wherever a name stands: PATH/file.py, PATH/file.py:Class or module:Class."
)
_INDENT: dict[str, Any] = {"initial_indent": "    ", "subsequent_indent": "    "}

proxies = Listing(plugins.PROXIES, "proxies", "list the proxy tasks that are installed")
encoders = Listing(plugins.ENCODERS, "encoders", "list the encoders that are installed")
