"""Leaderboards: suites of jobs, and reports of their records."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl3d_benchmarks import Words, words_of

if TYPE_CHECKING:
    from ssl3d_benchmarks.leaderboard.report.output import Report


def run_suite(suite: str | Path, out: str | Path = "runs/leaderboard", **options: Any) -> int:
    """Run the jobs of a suite and write OUT/report, as `ssl3d leaderboard run` does.

    Args:
        suite: Name of a built-in suite, or a YAML file.
        out: Folder of the records.
        options: Options of the command, with underscores.

    Returns:
        The exit status: 0, or 1 if a job failed.
    """
    from ssl3d_benchmarks.leaderboard.suite.run import RunOptions, run

    return run(RunOptions(str(suite), Path(out), **options))


def read_report(results: Words, **options: Any) -> Report:
    """Read folders of records into all that a report says of them, as numbers.

    Args:
        results: Folders of records.
        options: `published` and `resamples` of `ssl3d leaderboard report`.
    """
    from ssl3d_benchmarks.leaderboard.report.output import read_report as read

    return read([Path(word) for word in words_of(results)], **options)
