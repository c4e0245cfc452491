"""`ssl3d convert`: a 2D network or another toolkit's checkpoint, made an encoder; ours for nnU-Net."""

from __future__ import annotations

from collections.abc import Sequence

summary = "make a 2D network or another toolkit's checkpoint an encoder, with a report"


def main(argv: Sequence[str]) -> int:
    """Converts, tells what became what, saves an encoder folder."""
    from ssl3d.config import parse
    from ssl3d.convert.command import ConvertOptions, run

    parsed = parse("ssl3d convert", ConvertOptions, argv)
    run(parsed.options, parsed.given)
    return 0
