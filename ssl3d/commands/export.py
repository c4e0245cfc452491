"""`ssl3d export`: encoders and fine-tuned models for other programs."""

from __future__ import annotations

from collections.abc import Sequence

from ssl3d.export.options import ExportOptions

summary = "write an encoder or a fine-tuned model for another program, checked"


def main(argv: Sequence[str]) -> int:
    """Write the export, check it, and say where it is."""
    from ssl3d.config import parse

    options = parse("ssl3d export", ExportOptions, argv).options
    from ssl3d.export.run import export

    for line in export(options).lines():
        print(line)
    return 0
