"""The command `ssl3d sweep`: which flags of pretrain or finetune give the best score?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssl3d.api import parse
from ssl3d_benchmarks.sweep.options import SweepOptions

summary = "find good flags of pretrain or finetune by Optuna, with any number of workers"

EPILOG = """FILE names the command, its fixed options, the flags to search and the score to go by: the
online score of a pretraining, or the score of a fine-tuning on the validation subjects. Test subjects are
never predicted. The same command goes on after any stop, and several may work on one OUT at a time, on
machines that share the folder too. `ssl3d info OUT` prints the table. Such a file in one
line: {command: finetune, options: runs/a --data scans.h5, search: {lr: {low: 1e-4, high: 1e-2}}}."""


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit status: 1 where no trial ended well."""
    options = parse("ssl3d sweep", SweepOptions, argv, epilog=EPILOG).options
    from ssl3d_benchmarks.sweep.run import sweep

    return sweep(options)


def describe(folder: Path) -> dict[str, Any]:
    """Describe the folder of a sweep in plain values, as `ssl3d info` shows it."""
    from ssl3d_benchmarks.sweep.table import describe

    return describe(folder)


def lines_of(info: dict[str, Any]) -> list[str]:
    """Return the lines that show the description of a sweep."""
    from ssl3d_benchmarks.sweep.table import lines_of

    return lines_of(info)
