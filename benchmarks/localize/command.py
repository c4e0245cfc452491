"""`ssl3d localize`: find where along the body unseen volumes and partial scans lie."""

from __future__ import annotations

from collections.abc import Sequence

from ssl3d.api import parse
from ssl3d_benchmarks.localize.options import LocalizeOptions

summary = "place unseen volumes and partial crops along the body with a sorting run, and measure the error"

EPILOG = "Positions are in mm; 0 is the middle of the average reference volume. No labels are used."


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    options = parse("ssl3d localize", LocalizeOptions, argv, epilog=EPILOG).options
    from ssl3d_benchmarks.localize.run import localize

    localize(options)
    return 0
