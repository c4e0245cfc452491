"""`ssl3d convert`: a 2D network with its weights, made 3D."""

from __future__ import annotations

from collections.abc import Sequence

summary = "make a 2D network with its weights a 3D encoder, with a report"


def main(argv: Sequence[str]) -> int:
    """Converts, tells what became what, saves an encoder folder."""
    from ssl3d.config import parse
    from ssl3d.convert.command import ConvertOptions, run

    run(parse("ssl3d convert", ConvertOptions, argv).options)
    return 0
