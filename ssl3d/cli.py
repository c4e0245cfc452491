"""The `ssl3d` command, which runs subcommands and prints errors as one line; imports nothing heavy."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from typing import NoReturn

from ssl3d import plugins
from ssl3d.amounts import printable
from ssl3d.errors import PluginError, Ssl3dError, TransientError, UsageError, is_out_of_memory, is_transient
from ssl3d.files import NOT_OURS
from ssl3d.training.preempt import Stoppable, Stopped, name_of

USAGE = """usage: ssl3d COMMAND [options]

Self-supervised pretraining of 3D medical image encoders.

commands:
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    It is 0, 1 (failed), 2 (wrong input), 3 (the machine failed: call again), or 128 + number of a signal.

    A command is an entry point in `ssl3d.commands`: an object (a module, usually) with `summary`, one
    line, and `main(argv) -> int | None`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not sys.warnoptions:  # what other packages do with torch.jit is no news to who trains
        for kind in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", kind)
    try:
        with Stoppable():
            status = _run(argv)
            sys.stdout.flush()
            return status
    except Ssl3dError as error:
        line = printable(" ".join(str(error).split()))
        print(line if line.startswith("ssl3d ") else f"ssl3d: {line}", file=sys.stderr)
        return error.exit_status
    except BrokenPipeError:
        # The reader (head, less) went away; Python would complain again while closing stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            name = str(error.filename)
            line = f"ssl3d: {name[:60]}...: a name of {len(name):,} characters; no file can have it"
            print(printable(line), file=sys.stderr)
            return 2
        if error.errno not in NOT_OURS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(printable(f"ssl3d: {where}{os.strerror(error.errno)}"), file=sys.stderr)
        status = TransientError.exit_status if is_transient(error) else UsageError.exit_status
        with contextlib.suppress(OSError):  # what is still to be written to a full device stays away
            sys.stdout.flush()
            return status
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return status
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(
            "ssl3d: out of memory; call again with more of it free, or with smaller batches or crops",
            file=sys.stderr,
        )
        return TransientError.exit_status
    except KeyboardInterrupt:
        print("ssl3d: interrupted", file=sys.stderr)
        return 130
    except Stopped as stop:
        print(f"ssl3d: stopped by {name_of(stop.signum)}", file=sys.stderr)
        return 128 + stop.signum


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "--help-all"):
        print(_help(), end="")
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"ssl3d {version('ssl3d')}")
        return 0
    if argv[0].startswith("-"):
        raise PluginError(f"{argv[0]}: a command must come first; ssl3d --help lists them")
    command = plugins.load(plugins.COMMANDS, argv[0])
    return command.main(argv[1:]) or 0


def _help() -> str:
    commands, failed = plugins.load_all(plugins.COMMANDS)
    width = max(map(len, plugins.names(plugins.COMMANDS)), default=0)
    lines = [f"  {name:{width}}  {command.summary}\n" for name, command in commands.items()]
    lines += [f"  {name:{width}}  ({error})\n" for name, error in failed.items()]
    return USAGE + "".join(lines) + "\n`ssl3d COMMAND --help` lists the options of a command.\n"


def script() -> NoReturn:
    """Run the command of `python -m ssl3d`, and exit."""
    sys.exit(main())
