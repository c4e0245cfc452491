"""`ssl3d linear-probe`: a frozen encoder's scores, with the rows they have to be read beside."""

from __future__ import annotations

from collections.abc import Sequence

from ssl3d.api import parse
from ssl3d_benchmarks.linear_probe.options import LinearProbeOptions

summary = (
    "score frozen encoders: linear probe of classes, values or masks, beside untrained and trivial rows"
)

EPILOG = """The data (class labels, real values, else masks) or --target decide the kind of probe.
Records are reused: the same contestant on the same split with the same options is not scored again."""


def main(argv: Sequence[str]) -> int:
    """Run the command `ssl3d linear-probe`."""
    options = parse("ssl3d linear-probe", LinearProbeOptions, argv, epilog=EPILOG).options
    from ssl3d_benchmarks.linear_probe.run import run

    run(options)
    return 0
