"""The command `ssl3d study`: does pretraining pay on these scans, and what is to be used?"""

from __future__ import annotations

from collections.abc import Sequence

from ssl3d.api import parse
from ssl3d_benchmarks.study.options import StudyOptions

summary = "ask whether pretraining pays on scans with some labels: plan, run and answer in the hours given"

EPILOG = """The scans are prepared and each part is timed for a step or a few; then the plan is
printed and written to OUT/suite.yaml, and done. The same command goes on after any stop, and several may
work on one OUT at a time. OUT/suite.yaml may be edited: once it is there, it is done as it stands. `ssl3d
leaderboard run OUT/suite.yaml --out OUT` does the same without the words at the end."""


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit status: 1 where a job failed."""
    options = parse("ssl3d study", StudyOptions, argv, epilog=EPILOG).options
    from ssl3d_benchmarks.study.run import study

    return study(options)
