"""`ssl3d leaderboard`: run a suite of contestants on tasks, and report their scores."""

from __future__ import annotations

from collections.abc import Sequence

from ssl3d.api import UsageError, parse

summary = "run contestants on a suite of tasks, and report which is better and how certain that is"

USAGE = """usage: ssl3d leaderboard {run,report,pack} [options]

  run SUITE --out RESULTS      run the pretraining and the scoring of a suite; it can be stopped and resumed
  report RESULTS --out DIR     write an HTML page, Markdown and CSV of the records in a folder or an archive
  pack RESULTS                 pack the records of a folder into one archive, which is read as the folder is

`ssl3d leaderboard run --help`, `report --help` and `pack --help` list their options.
"""

REPORT_EPILOG = """Records that cannot be compared, because their task version, split, data or preprocessing
differ, are refused by name. Contestants whose pretraining saw test subjects are shown but not
ranked. Nothing is trained."""

PACK_EPILOG = """`ssl3d leaderboard report` and `run` read the archive as they read the folder, and
`tar xJf` unpacks it. Records that are made later lie beside it as files until
the folder is packed again."""


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    if not argv or argv[0] in ("-h", "--help", "--help-all"):
        print(USAGE, end="")
        return 0 if argv else 2
    word, rest = argv[0], list(argv[1:])
    if word == "report":
        from ssl3d_benchmarks.leaderboard.report.output import ReportOptions, report

        report(parse("ssl3d leaderboard report", ReportOptions, rest, epilog=REPORT_EPILOG).options)
        return 0
    if word == "pack":
        from ssl3d_benchmarks.leaderboard.archive import PackOptions, pack

        pack(parse("ssl3d leaderboard pack", PackOptions, rest, epilog=PACK_EPILOG).options)
        return 0
    if word == "run":
        from ssl3d_benchmarks.leaderboard.suite.run import RunOptions, run

        return run(parse("ssl3d leaderboard run", RunOptions, rest).options)
    raise UsageError(f"ssl3d leaderboard: {word!r} is none of run, report, pack")
